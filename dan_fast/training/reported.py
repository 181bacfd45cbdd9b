"""Which epoch's figures a training reports: the last one's, unless one is chosen on the targets, which is then said."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_text
from dan_fast.core.float32 import BFLOAT16_ON_A_CPU, float32_rounding
from dan_fast.data import ReIDDataset
from dan_fast.data.named_protocols import DatasetRoles
from dan_fast.data.overlap import numbering_of, persons_in_both, taken_for_one
from dan_fast.evaluation import Evaluation
from dan_fast.training.checkpoint import fitting_this_version, load_checkpoint, save_checkpoint
from dan_fast.training.config import TrainConfig
from dan_fast.training.display import Display
from dan_fast.training.recipes import NO_RECIPE, recipe_changes, recipe_words
from dan_fast.training.surroundings import changes_of_surroundings, rounding_in_words
from dan_fast.training.without_effect import without_effect

CHOSEN = "CHOSEN ON THE TARGET: not comparable"
SEEN = "OF THE PERSONS TESTED ON WERE TRAINED ON: not comparable"


def epoch_of(state: Mapping[str, Any]) -> str:
    """The epoch of a checkpoint in words.

    Example:
        >>> epoch_of({"epoch": 37, "iteration": 0, "config": {"optimizer": {"epochs": 150}}, "chosen": True})
        'epoch 37 of 150, CHOSEN ON THE TARGET: not comparable'
    """
    words = f"epoch {state['epoch']} of {state['config']['optimizer']['epochs']}"
    if state["iteration"]:
        words += f" and {state['iteration']} iterations"
    return f"{words}, {CHOSEN}" if state.get("chosen", False) else words


def seen_of(state: dict[str, Any], target: ReIDDataset) -> str:
    """How many of a target's persons a checkpoint's network was trained on, in words; "" for none, as far as known.

    Known are the persons of the datasets, and the images, that lie where they lay in training; older checkpoints do not
    name any, nor do folders of `dan-fast share`, which the words then say.
    """
    if "shared" in state:
        return "persons trained on not recorded"
    trained = {root: set(pids.tolist()) for root, pids in state.get("persons", {}).items()}
    both = persons_in_both(trained, target, set(state["images"].tolist()) if "images" in state else frozenset())
    before = ["persons that its first weights were trained on not recorded"] if state.get("unrecorded") else []
    return ", ".join([f"{len(both)} {SEEN}"] * bool(both) + before)


def of_its_own_cameras(state: dict[str, Any], target: ReIDDataset) -> bool:
    """Whether a checkpoint's network was trained on images of the set that a target is of, as far as known.

    Known are sets whose persons are numbered alike, and those that lie where they lay in training.
    """
    return numbering_of(target) in state.get("persons", {}) or os.path.realpath(target.root) in state.get("roots", ())


def of_training(evaluation: Evaluation, state: dict[str, Any], target: ReIDDataset, protocol: str) -> Evaluation:
    """Figures of a checkpoint's network on a target, with what is said of its training beside them.

    Args:
        protocol: the name of the one that was trained and tested by, "" for none.
    """
    return replace(
        evaluation,
        named_protocol=protocol,
        epoch=epoch_of(state),
        recipe=recipe_words(state["config"], TrainConfig().to_dict()),
        seen=seen_of(state, target),
        known_cameras=of_its_own_cameras(state, target),
    )


class EpochChoice:
    """The epoch of the highest mAP so far, on average over the targets; of equal ones the first.

    Figures of an epoch that was chosen by the images it is tested on are too high to be compared with those of the
    last epoch; they say so wherever they go.

    Args:
        path: where the epoch's figures and weights are kept, in a checkpoint to evaluate, not to continue.
        resume: whether an earlier part of the training kept some there.
        targets: titles of the datasets tested on.
        writes: whether this process, of several ranks, keeps the file.

    Raises:
        DanFastError: the file holds an epoch that was chosen on other targets; or see `load_checkpoint`.
    """

    def __init__(self, path: Path, resume: bool, targets: Sequence[str], writes: bool = True) -> None:
        self.path = path
        self._writes = writes
        self.evaluations: list[Evaluation] = []
        self.weights = ""
        if resume and path.is_file():
            state = load_checkpoint(path)
            with fitting_this_version(path):
                self.evaluations = [Evaluation.from_dict(each) for each in state["evaluations"]]
            self.weights = state.get("weights_hash", "")  # older ones do not say it
            self._require_the_same([each.title for each in self.evaluations], targets)

    def offer(self, evaluations: Sequence[Evaluation], state: dict[str, Any], weights: str) -> None:
        """Take an epoch, its figures, its checkpoint's state and its network's hash, if it is the best so far.

        Raises:
            DanFastError: an earlier epoch was chosen on other images; or see `save_checkpoint`.
        """
        if self.evaluations:
            kept, found = (
                [(x.title, x.num_query, x.num_gallery) for x in each] for each in (self.evaluations, evaluations)
            )
            self._require_the_same(kept, found)
        if self.evaluations and _score(evaluations) <= _score(self.evaluations):
            return
        state = {**state, "chosen": True}
        chosen = [replace(each, epoch=epoch_of(state)) for each in evaluations]
        if self._writes:
            kept = {"evaluations": [each.to_dict() for each in chosen], "weights_hash": weights}
            save_checkpoint(self.path, {**state, **kept})
        self.evaluations, self.weights = chosen, weights

    def _require_the_same(self, kept: Sequence[Any], targets: Sequence[Any]) -> None:
        """The weights of the chosen epoch are nowhere else: they are not exchanged for those of another choice."""
        if list(kept) != list(targets):
            raise DanFastError(
                f"{self.path} holds the epoch chosen on {', '.join(each.title for each in self.evaluations)}, and "
                "these targets are others: move it to another place, or set run.choose_epoch_on_target to false."
            )


def opening_lines(
    config: TrainConfig, datasets: DatasetRoles, device: torch.device, past: Mapping[str, Any]
) -> Iterator[str]:
    """What a run says before it starts: its recipe and what is changed on top of it, where it comes from, under what
    else it ran, what its datasets hold, its protocol, what is left aside, what has no effect, what becomes of float32.

    `past` is what `whom_it_saw` and `ran_under` give.
    """
    if words := config.recipe_words:
        yield f"{words[0].upper()}{words[1:]}."
    if past.get("started_from"):
        yield f"Starts from {', which started from '.join(past['started_from'])}."
    changed = ", ".join(changes_of_surroundings(past["ran_under"]))
    if changed:
        yield f"Not all of this run ran alike: {changed}."
    # A set may be trained on and tested on.
    yield from dict.fromkeys(f"{each.contents}." for sets in datasets for each in sets)
    yield from taken_for_one((*datasets.labeled, *datasets.unlabeled))
    labeled, unlabeled, targets = (", ".join(each.title for each in sets) for sets in datasets)
    takes_unlabeled = len(datasets.unlabeled) > 0 and config.data.unlabeled_share > 0
    if config.data.protocol:
        without_labels = f"; without labels on {unlabeled}" if takes_unlabeled else ""
        yield f"Protocol {config.data.protocol}: trained on {labeled}{without_labels}; tested on {targets}."
    if datasets.unlabeled and not takes_unlabeled:
        yield (
            f"{unlabeled} is left aside, because "
            "data.unlabeled_share is 0: --recipe dan and --recipe paper train with unlabelled images."
        )
    if config.run.evaluate_every and not datasets.targets:
        yield f"run.evaluate_every {config.run.evaluate_every} changes nothing without data.targets or data.protocol."
    yield from without_effect(config, takes_unlabeled)
    if device.type == "cpu" and config.run.precision == "bfloat16":
        yield BFLOAT16_ON_A_CPU
    rounding = float32_rounding(device)
    if rounding and config.run.precision == "float32":
        yield f"Float32 on {device}: {rounding}, as torch.backends has it."


def say(evaluation: Evaluation, display: Display) -> None:
    """Print the figures of a target, with what has to be the same in figures they are compared with, and the recipe."""
    recipe = f"; {evaluation.recipe}" if evaluation.recipe else ""
    display.say(f"{evaluation.title} ({evaluation.conditions}): {evaluation.figures}{recipe}")


def write_results(
    path: Path,
    state: dict[str, Any],
    datasets: DatasetRoles,
    last: list[Evaluation],
    weights: str,
    choice: EpochChoice | None,
    iterations: int,
) -> None:
    """Write what a finished training reports as JSON: recipe, protocol, data, precision, epoch, versions and figures.

    With "skipped", the number of training images that could not be decoded. Written by `write_text`.

    Args:
        path: the file to write.
        state: the checkpoint's, of the last epoch.
        datasets: trained on and tested on.
        last: evaluations of the last epoch.
        weights: of which network they are, `weights_hash`.
        choice: the chosen epoch, whose figures are then reported, with the hash of its network, "" where an older
            chosen.pt does not say it; those of the last one and how often there was one to choose stand beside them.
        iterations: how many the whole training took.
    """
    settings, defaults = state["config"], TrainConfig().to_dict()
    reported = last if choice is None else choice.evaluations
    unlabeled = datasets.unlabeled if settings["data"]["unlabeled_share"] > 0 else ()
    results: dict[str, Any] = {
        "recipe": settings.get("recipe", NO_RECIPE),
        "recipe_changes": recipe_changes(settings, defaults),
        "epochs": state["epoch"],
        "iterations": iterations,
        "ranks": state["ranks"],
        "ran_under": state["ran_under"],
        "precision": settings["run"]["precision"],
        "float32": rounding_in_words(state["ran_under"]),
        "protocol": settings["data"]["protocol"],
        "labeled": [dataset.title for dataset in datasets.labeled],
        "unlabeled": [dataset.title for dataset in unlabeled],
        "unlabeled_share": settings["data"]["unlabeled_share"],
        "fingerprint": state["fingerprint"],
        "skipped": len(state["skipped"]),
        "epoch": reported[0].epoch if reported else epoch_of(state),
        "weights": weights,
        "targets": [each.to_dict() for each in reported],
    }
    if "started_from" in state:
        results["started_from"] = state["started_from"]
    if settings["run"].get("compile"):
        results["compiled"] = state.get("compiled") or "The run ended before it was known whether that is faster."
    if choice is not None:
        results["evaluate_every"] = settings["run"]["evaluate_every"]
        results["chosen_weights"] = choice.weights
        results["last_epoch"] = [each.to_dict() for each in last]
    write_text(path, json.dumps(results, indent=2) + "\n")


def _score(evaluations: Sequence[Evaluation]) -> float:
    return sum(each.mAP for each in evaluations) / len(evaluations)
