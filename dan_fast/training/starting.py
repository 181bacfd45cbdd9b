"""A trained network as what another training starts from: its weights, and whom they were trained on."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dan_fast.core.errors import DanFastError
from dan_fast.core.home import expanded
from dan_fast.data import TrainingSet
from dan_fast.nn import DAN
from dan_fast.nn.backbones.timm import PREFIX, TimmMap, downloaded_in_words, with_positions_of
from dan_fast.nn.backbones.weights import load_fitting
from dan_fast.nn.hub import WEIGHTS
from dan_fast.training.checkpoint import is_checkpoint, load_checkpoint
from dan_fast.training.last_names import names_of_paths
from dan_fast.training.recipes import word_of
from dan_fast.training.reported import epoch_of


def start_of(weights: str) -> dict[str, Any] | None:
    """What `load_checkpoint` gives where `model.weights` is a checkpoint or a shared folder; None where it is not."""
    path = expanded(weights)
    named = weights not in ("none", "imagenet")
    return load_checkpoint(path) if named and (path.is_dir() or is_checkpoint(path)) else None


def hash_of_start(weights: str) -> str | None:
    """What tells the file at `model.weights` from others, in 32 hexadecimal digits; None where it names none.

    Of a shared folder it is that of its tensors.
    """
    path = expanded(weights)
    file = path / WEIGHTS if path.is_dir() else path
    if weights in ("none", "imagenet") or not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def take_weights(network: DAN, trained: DAN, weights: str) -> None:
    """Give a new network the backbone of a trained one, the attention where it is of one kind, and how images are read.

    The classifier, of other persons, stays as it is drawn. Position embeddings are resampled to the size of image.

    Raises:
        DanFastError: another backbone, one with instance norm and one without, or tensors of another shape, as those of
            relative positions for another size of image.
    """
    given = {
        "backbone": (network.backbone_name, trained.backbone_name),
        "instance_norm": (network.instance_norm, trained.instance_norm),
    }
    for name, (wanted, found) in given.items():
        if wanted != found:
            raise DanFastError(
                f"model.weights {weights} holds a network of model.{name} {word_of(found)}, and here it is "
                f"{word_of(wanted)}: set model.{name} to {word_of(found)}, or name other weights."
            )
    height, width = network.image_size
    owner = f"{network.backbone_name} for images of {height} x {width}"
    state = trained.backbone.state_dict()
    if isinstance(network.backbone, TimmMap):
        state = with_positions_of(network.backbone, trained.backbone)
    load_fitting(network.backbone, state, owner, weights, lambda key: False)
    kinds = [(each.attention.variant, each.attention.reduction, each.map_size) for each in (network, trained)]
    if kinds[0] == kinds[1]:
        network.attention.load_state_dict(trained.attention.state_dict())
    network.preprocessing = trained.preprocessing


def whom_it_saw(
    training_set: TrainingSet, backbone: str, weights: str, saved: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Whom the network of a run is trained on, before it too, as its checkpoints say.

    Args:
        training_set: of the run.
        backbone, weights: what it starts from, `model.backbone` and `model.weights`.
        saved: the run's checkpoint where it goes on from one.

    Returns:
        "persons", "images" and "roots" as of `TrainingSet`, and "first_weights", `hash_of_start`. Where it starts from
        a trained network or from what timm downloads, "started_from" as well, each training before it in words, the
        last one first; and "unrecorded", whether persons of one are not known.
    """
    start = None if saved is not None else start_of(weights)
    before = saved or start or {}
    persons, images = training_set.persons, training_set.images
    for numbering, pids in before.get("persons", {}).items():
        persons = persons | {numbering: _union(persons.get(numbering, pids), pids)}
    first = saved.get("first_weights") if saved is not None else hash_of_start(weights)
    seen = {
        "persons": persons,
        "images": _union(images, before.get("images", images)),
        "roots": sorted({*training_set.roots, *before.get("roots", ())}),
        "first_weights": first,
    }
    if saved is None and weights == "imagenet" and backbone.startswith(PREFIX):
        downloaded = downloaded_in_words(backbone.removeprefix(PREFIX))
        return seen | ({"started_from": [downloaded], "unrecorded": False} if downloaded else {})
    if start is None:
        return seen | {name: before[name] for name in ("started_from", "unrecorded") if name in before}
    whole = {"persons", "images"} <= start.keys() and not start.get("unrecorded", False)
    earlier = start.get("shared", start).get("started_from", [])
    return seen | {"started_from": [_words(weights, start), *earlier], "unrecorded": not whole}


def _union(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return torch.cat([some, others]).unique()


def _words(weights: str, start: Mapping[str, Any]) -> str:
    """A training in words, without the folders of the machine it ran on."""
    data, path = start["config"]["data"], Path(weights)
    labeled = ", ".join(names_of_paths(data["labeled"])[0])
    # Each run's file is a checkpoint.pt; a shared folder has a name of its own.
    name = path.name if "shared" in start else f"{path.parent.name}/{path.name}".lstrip("/")
    return f"{name}, {epoch_of(start)}, trained on {labeled or data.get('protocol') or 'what is not recorded'}"
