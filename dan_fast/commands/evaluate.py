"""`dan-fast evaluate`: CMC, mAP and mINP of a trained network on target sets."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dan_fast.core.batches import BrokenImages
from dan_fast.core.devices import resolve_device
from dan_fast.core.errors import DanFastError
from dan_fast.core.files import require_own_json, write_text
from dan_fast.core.float32 import BFLOAT16_ON_A_CPU
from dan_fast.core.launched import own_rank
from dan_fast.core.terminal import PLAIN, LastingConsole, progress_line
from dan_fast.data import ImageCache
from dan_fast.data.datasets.load import read_targets, told_apart
from dan_fast.data.named_protocols import resolve_protocol
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import joined
from dan_fast.evaluation import (
    DatasetFeatures,
    Evaluation,
    Features,
    Reranking,
    evaluate_features,
    extract_dataset,
    require_scorable,
)
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.training.build import initial_network, network_of
from dan_fast.training.checkpoint import load_checkpoint
from dan_fast.training.config import CacheCheck, ModelConfig, Paths, Precision, as_list
from dan_fast.training.reported import of_training, seen_of
from dan_fast.training.starting import hash_of_start, start_of

_LOG = logging.getLogger(__name__)
_OF_A_TRAINING = ("checkpoint.pt", "chosen.pt", "config.yaml", "results.json")


def evaluate(
    checkpoint: str,
    targets: Paths | None = None,
    protocol: str | None = None,
    root: str | None = None,
    baselines: bool = False,
    repeats: PositiveInt = 10,
    seed: NonNegativeInt = 0,
    metric: Literal["cosine", "euclidean"] = "cosine",
    ap: Literal["standard", "trapezoid"] = "standard",
    rerank: bool = False,
    batch_size: PositiveInt = 128,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    precision: Precision = "float32",
    broken_images: BrokenImages = "error",
    cache: str = "none",
    cache_check: CacheCheck = "quick",
    out: str | None = None,
) -> None:
    """Print CMC, mAP and mINP of a trained network on target sets, line by line and at the end as a table.

    Where torchrun has started several ranks, they evaluate together; the figures are those of a single rank.

    Args:
        checkpoint: The checkpoint.pt of a run, its chosen.pt, or a folder that `dan-fast share` wrote.
        targets: Folders or manifests with query and gallery images, or with test images. Test images are split by the
            fixed splits of a known dataset, or else at random.
        protocol: Name of a protocol of the literature, such as p1, in place of targets.
        root: Folder that contains the protocol's targets, up to two levels deep.
        baselines: Also evaluate the network as it was before training, and random features (chance). Not possible for a
            shared folder whose training started from a file of weights, which it does not contain, or if that file has
            changed since.
        repeats: Number of random splits of a target that has no fixed ones; mean and standard deviation are printed.
        seed: Seed of the random splits and of the random features of --baselines.
        metric: How features are compared.
        ap: standard takes the mean of the precision at each true match, trapezoid is the rule of the old MATLAB code.
        rerank: Re-rank by k-reciprocal encoding (Zhong et al. 2017; k1 20, k2 6, lambda 0.3); the results say so.
        batch_size: Images at a time.
        workers: Processes that decode images; 0 decodes in this one.
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        precision: float32, which trainings of any precision use to evaluate, or bfloat16 autocast.
        broken_images: Stop with an error at an image that cannot be decoded, or skip and count it.
        cache: Folder that keeps decoded images for the next evaluation; user is dan-fast in the user's cache folder,
            none decodes images each time.
        cache_check: quick compares the sizes and modification times of the images, full compares all contents.
        out: Also write the figures to this JSON file, which is new or from an earlier evaluation. If it lies in the
            folder of its run, a report shows them.
    """
    if seed >= 2**64:
        raise DanFastError(f"The seed is {seed}: it must be below 2^64.")
    paths = as_list(targets or [])
    _require_targets(paths, protocol, root)
    if out is not None and own_rank() == 0:
        _require_own(Path(out))
    place = resolve_device(device)
    with joined(place) as process_group:
        state = load_checkpoint(checkpoint)
        if protocol is None:
            datasets = told_apart(read_targets(paths))
        else:
            datasets = resolve_protocol(protocol, root, targets_only=True).targets
        for dataset in datasets:
            require_scorable(dataset, ap, rerank)
        network, settings = network_of(state, checkpoint), state["config"]
        if baselines:
            _require_first_weights(state, checkpoint)
        weights = weights_hash(network)
        image_size = tuple(settings["data"]["image_size"])
        preprocessing = network.preprocessing
        # Apart from the table: what is done stays readable where a later target fails or is not waited for.
        progress = LastingConsole(stderr=True, quiet=own_rank() > 0)
        decoded = ImageCache.of_setting(
            cache,
            image_size,
            cache_check,
            workers=workers,
            say=partial(progress.print, **PLAIN) if own_rank() == 0 else _LOG.info,
            interpolation=preprocessing.interpolation,
        )
        embeddings: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {"trained": network.to(place).embed}
        if baselines:
            start = start_of(ModelConfig(**settings["model"]).weights)
            first = "untrained" if start is None else "initial"
            embeddings[first] = initial_network(settings, network.classifier.out_features).to(place).eval().embed
            embeddings["chance"] = None
        generator = torch.Generator().manual_seed(seed)

        results: list[tuple[str, Evaluation]] = []
        for dataset in datasets:
            features = None
            for name, embed in embeddings.items():
                if embed is None:
                    features = _random_features(features, generator, process_group)
                else:
                    with progress_line(progress, f"Testing {name} features on {dataset.title}") as show:
                        features = extract_dataset(
                            embed,
                            dataset,
                            image_size,
                            batch_size=batch_size,
                            workers=workers,
                            device=place,
                            precision=precision,
                            process_group=process_group,
                            broken_images=broken_images,
                            progress=show,
                            cache=decoded,
                            preprocessing=preprocessing,
                        )
                scoring = {"metric": metric, "ap": ap, "reranking": Reranking() if rerank else None}
                evaluation = evaluate_features(features, repeats, seed, **scoring, process_group=process_group)
                if name == "trained":
                    evaluation = of_training(evaluation, state, dataset, _tested_by(protocol, settings))
                elif name == "initial":
                    evaluation = replace(evaluation, seen=seen_of(start, dataset))
                results.append((name, evaluation))
                progress.print(f"{evaluation.title}, {name}: {evaluation.figures}", **PLAIN)
    if own_rank() > 0:
        return

    if out is not None:
        # Before the table is printed, which may fail: to a full disk, or a reader that has left.
        content = [{"features": name, "weights": weights, **evaluation.to_dict()} for name, evaluation in results]
        write_text(out, json.dumps(content, indent=2) + "\n")
    # Folded: a variant must stay readable in a narrow window.
    table = Table(Column("target", overflow="fold"), "features", *results[0][1].percentages())
    for name, evaluation in results:
        table.add_row(Text(evaluation.title), name, *evaluation.row())
    Console().print(table)
    for dataset in datasets:
        print(f"{dataset.contents}.")
    for title in (evaluation.title for name, evaluation in results if name == "trained" and evaluation.known_cameras):
        print(f"{title}: the network was trained on images of this set, whose cameras are no unseen ones.")
    for name, evaluation in results:
        print(f"{evaluation.title}, {name}: {evaluation.conditions_and_recipe}.")
    if place.type == "cpu" and precision == "bfloat16":
        print(BFLOAT16_ON_A_CPU)
    for path in sorted({path for _, evaluation in results for path in evaluation.skipped}):
        print(f"Skipped {path}: it cannot be decoded.")


def _random_features(
    features: DatasetFeatures, generator: torch.Generator, process_group: ProcessGroup | None
) -> DatasetFeatures:
    """Random numbers in place of features; each rank keeps its own of what one rank would draw."""

    def drawn(part: Features) -> torch.Tensor:
        return torch.randn(len(part.paths), 64, generator=generator)

    def own(part: Features, numbers: torch.Tensor) -> Features:
        return part._replace(features=numbers[part.division(process_group).rows].clone())

    if features.test is not None:
        return features._replace(test=own(features.test, drawn(features.test)))
    query = drawn(features.query)
    gallery = query if features.gallery.paths == features.query.paths else drawn(features.gallery)
    return features._replace(query=features.query._replace(features=query), gallery=own(features.gallery, gallery))


def _require_first_weights(state: dict[str, Any], checkpoint: str) -> None:
    """Refuse to evaluate the network as it was before training where the weights it started from are not known."""
    weights = ModelConfig(**state["config"]["model"]).weights
    # What is shared holds the name of their file only, and a file of that name here would be another one.
    if "shared" in state and weights not in ("none", "imagenet"):
        raise DanFastError(
            f"{checkpoint} is a shared folder, which does not hold the weights that its training started from "
            f"({weights}): evaluate it without --baselines, or the checkpoint.pt of the run."
        )
    first, found = state.get("first_weights"), hash_of_start(weights)
    # Older checkpoints do not know theirs, and a file that is gone is for its reader to name.
    if None not in (first, found) and first != found:
        raise DanFastError(
            f"{weights} is another file than the one that this training started from: put that one back, or evaluate "
            "without --baselines."
        )


def _require_own(out: Path) -> None:
    if out.name in _OF_A_TRAINING and (out.parent / "config.yaml").is_file():
        raise DanFastError(f"{out} is written by the training itself: name another file, such as evaluation.json.")
    require_own_json(out, ["features", "cmc"])


def _require_targets(paths: Sequence[str], protocol: str | None, root: str | None) -> None:
    if protocol is None and root is not None:
        raise DanFastError("root is of no use without protocol: name a protocol or leave root out.")
    if protocol is None and not paths:
        raise DanFastError("targets is empty: name at least one folder or manifest, or a protocol and a root.")
    if protocol is not None and paths:
        raise DanFastError(
            f"protocol {protocol} and targets are both given: a protocol names its targets, so leave out one or the "
            "other."
        )
    if protocol is not None and root is None:
        raise DanFastError(f"protocol {protocol} needs root: name the folder in which its targets lie.")


def _tested_by(protocol: str | None, settings: dict[str, Any]) -> str:
    """The name of the protocol beside a checkpoint's figures, marked where the network was not trained by it."""
    if protocol is None or settings["data"].get("protocol") == protocol:
        return protocol or ""
    return f"targets of {protocol}, NOT TRAINED BY IT"
