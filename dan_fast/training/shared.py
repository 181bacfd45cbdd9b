"""What goes with the weights of a checkpoint when they are shared: how they were trained and what they scored."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dan_fast.core.errors import DanFastError
from dan_fast.data.samples import without_variant
from dan_fast.evaluation import Evaluation
from dan_fast.training.config import DATASETS, TrainConfig, as_list
from dan_fast.training.last_names import last_names, names_of_paths
from dan_fast.training.recipes import recipe_words
from dan_fast.training.reported import epoch_of

# Of a run's folder only results of the epoch that a checkpoint holds belong to it.
_EVALUATIONS = ("targets", "last_epoch")
# Settings that are, or may be, folders and files of the machine that trained, beside lists of datasets.
_PLACES = (("data", "root"), ("data", "cache"), ("model", "weights"), ("run", "out"))
# What of the training names datasets.
_SETS = ("trained_on", "trained_without_labels_on")


def origin_of(
    checkpoint: str | Path, state: Mapping[str, Any], weights: str | None = None
) -> tuple[dict[str, Any], list[Evaluation]]:
    """How a checkpoint's network was trained, in plain JSON, and what it scored, for `DAN.save_pretrained`.

    Folders and files are reduced to their names: what is shared does not show where they lay. So are datasets that are
    told apart by the folders above them; where that makes names equal, they are numbered, as in "market (2)".

    Args:
        checkpoint: the file, beside which results.json may lie; or a folder that `dan-fast share` wrote.
        state: what `dan_fast.training.checkpoint.load_checkpoint` gave for it.
        weights: `weights_hash` of its network; results.json that names another one is not looked at, as where the
            checkpoints of several trainings lie in one folder.

    Returns:
        `training`: the labelled and the unlabelled sets, recipe and epoch in words; "settings", those of
        `TrainConfig`; and "checkpoint", which identifies the epoch. `results`: the evaluations of this epoch that the
        checkpoint or results.json holds.

    Raises:
        DanFastError: results.json is damaged.

    Example:
        >>> config = TrainConfig.of_recipe("plain", data={"labeled": "/home/me/market"}).to_dict()
        >>> training, results = origin_of("runs/x/checkpoint.pt", {"config": config, "epoch": 60, "iteration": 0})
        >>> training["trained_on"], training["method"], training["weights_of"], results
        (['market'], 'recipe plain', 'epoch 60 of 500', [])
    """
    if "shared" in state:
        return _by_last_names(state["shared"], [Evaluation.from_dict(each) for each in state["evaluations"]])
    settings, epoch = _without_folders(state["config"]), epoch_of(state)
    beside = Path(checkpoint).parent / "results.json"
    reported = _results(beside)
    # It names the network of the last epoch; a chosen one has its figures with it.
    if not state.get("chosen") and weights is not None and reported.get("weights", weights) != weights:
        reported = {}
    of_protocol = [settings["data"].get("protocol") or "not recorded"]
    unlabeled = [] if settings["data"].get("unlabeled_share") == 0 else settings["data"]["unlabeled"]
    training = {
        "trained_on": reported.get("labeled") or settings["data"]["labeled"] or of_protocol,
        "trained_without_labels_on": reported.get("unlabeled", unlabeled),
        "started_from": state.get("started_from", []),
        "images_left_out_as_broken": len(state.get("skipped", ())),
        "method": recipe_words(settings, TrainConfig().to_dict()),
        "weights_of": epoch,
        "settings": settings,
        "checkpoint": {
            "epoch": state["epoch"],
            "iteration": state["iteration"],
            "chosen": state.get("chosen", False),
        },
    }
    with _undamaged(beside):
        found = state.get("evaluations") or [each for part in _EVALUATIONS for each in reported.get(part, [])]
        of_epoch = [Evaluation.from_dict(each) for each in found if each.get("epoch") == epoch]
    results = [replace(each, skipped=tuple(Path(path).name for path in each.skipped)) for each in of_epoch]
    return _by_last_names(training, results)


def _by_last_names(
    training: Mapping[str, Any], results: Sequence[Evaluation]
) -> tuple[dict[str, Any], list[Evaluation]]:
    """Training and results, a dataset by the same name in both."""
    tested = {each.title: each.dataset for each in results}
    # A shared folder may hold anything.
    sets = {part: training[part] for part in _SETS if isinstance(training.get(part), list)}
    # Of what was not tested on the title alone is known.
    names = {title: tested.get(title, without_variant(title)) for titles in sets.values() for title in titles}
    shown = last_names([*names.values(), *(each.dataset for each in results)])
    short = {title: shown[name] + title.removeprefix(name) for title, name in names.items()}
    sets = {part: [short[title] for title in titles] for part, titles in sets.items()}
    return {**training, **sets}, [replace(each, dataset=shown[each.dataset]) for each in results]


def _results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with _undamaged(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            return {}
        for part in ("labeled", "unlabeled"):
            names = content.get(part) or []
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"{part} is no list of names")
        return content


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DanFastError(f"{path} is damaged ({error}): remove it, or evaluate again.") from error


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    shown = {section: dict(values) if isinstance(values, Mapping) else values for section, values in settings.items()}
    for section, name in _PLACES:
        if value := shown[section].get(name):
            shown[section][name] = Path(value).name
    lists = names_of_paths(*(as_list(shown["data"].get(name) or []) for name in DATASETS))
    shown["data"].update(zip(DATASETS, lists, strict=True))
    # JSON has no number for a checkpoint that is never due by time.
    for values in (each for each in shown.values() if isinstance(each, dict)):
        values.update({name: str(x) for name, x in values.items() if isinstance(x, float) and not math.isfinite(x)})
    return shown
