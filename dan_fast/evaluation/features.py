"""Features of a list of images, with the identities and cameras they are scored by."""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.data.images.cache import ImageCache
from dan_fast.data.images.loader import image_loader
from dan_fast.data.samples import Sample
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import gathered, require_same
from dan_fast.distributed.shards import check_backend
from dan_fast.evaluation.divided import Division, refused_by_all

# Bytes of features that travel at a time.
_TRAVEL_BYTES = 64 * 2**20


class Features(NamedTuple):
    """Embedded images.

    Attributes:
        features: (n, d) float32 on the CPU; where images are divided over ranks, those of this rank only.
        pids: (n,) int64 identities, of all images like all that follows.
        camids: (n,) int64 cameras.
        paths: the n image files.
        skipped: the files that could not be decoded and were left out.
        sizes: how many images, consecutive ones, each rank of a process group holds the features of; empty where all
            are here.
    """

    features: Tensor
    pids: Tensor
    camids: Tensor
    paths: tuple[Path, ...]
    skipped: tuple[Path, ...] = ()
    sizes: tuple[int, ...] = ()

    def select(self, indices: Tensor, process_group: ProcessGroup | None = None, divided: bool = False) -> "Features":
        """The images at the given (k,) int64 indices, in that order.

        Args:
            indices: of the images; the same on all ranks.
            process_group: over which the features are divided; all its ranks have to call this.
            divided: whether the result is divided over the ranks, too, or whole on each of them.

        Raises:
            ValueError: the features are divided, and not over `process_group`.
        """
        own = self.division(process_group)
        parts = Division.of_images(process_group, len(indices))
        chosen = parts.rows if divided else slice(0, len(indices))
        return Features(
            own.select(self.features, indices, chosen, _TRAVEL_BYTES),
            self.pids[indices],
            self.camids[indices],
            tuple(self.paths[index] for index in indices.tolist()),
            sizes=tuple(parts.sizes) if divided and process_group is not None else (),
        )

    def division(self, process_group: ProcessGroup | None) -> Division:
        """How the images are divided over the ranks of a group."""
        if len(self.sizes) != (0 if process_group is None else process_group.size()):
            raise ValueError(
                f"the features are in {max(1, len(self.sizes))} parts: hand in the process_group that they were "
                "extracted with, or none where there was none."
            )
        return Division(process_group, self.sizes or (len(self.features),))


def extract_features(
    embed: Callable[[Tensor], Tensor],
    samples: Sequence[Sample],
    image_size: tuple[int, int],
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    broken_images: Literal["error", "skip"] = "error",
    progress: Callable[[int, int], None] | None = None,
    cache: ImageCache | None = None,
    preprocessing: Preprocessing | None = None,
    process_group: ProcessGroup | None = None,
) -> Features:
    """Embed images in order, without gradients.

    A network has to be in evaluation mode: with batch normalisation or dropout in training mode the features would
    depend on the batch. This is checked where ``embed`` is a module, a method of one, or either in
    ``functools.partial`` or ``torch.compile``; otherwise it is up to the caller.

    With ``process_group`` the batches, which are those of a single rank, are divided over the ranks: each rank reads
    and embeds consecutive batches and keeps their features; all ranks know the labels, the paths and what was skipped.

    Args:
        embed: maps (B, 3, H, W) float32 images on ``device`` to (B, d) features; ``DAN.embed``, for example.
        samples: images to embed.
        image_size: (height, width) in pixels.
        batch_size: images at a time.
        workers: processes that decode images; 0 decodes in this one.
        device: where ``embed`` runs.
        precision: ``"bfloat16"`` runs ``embed`` under autocast.
        broken_images: an unreadable image is an error, or is left out of the result.
        progress: called with (images read, images in all) at each batch, of this rank's.
        cache: holds or takes the decoded images, of all ranks; the features are the same.
        preprocessing: how images are resized and normalised for the network; by default as that module, or the modules
            inside it that have a ``preprocessing`` (``DAN.preprocessing``), say, else torchvision's for ImageNet.
        process_group: ranks that are all given the same images and settings, and a network of the same weights; with a
            backend for tensors on the host, where the features lie.

    Raises:
        DanFastError: no samples, none readable, or one unreadable where ``broken_images`` is ``"error"``; features that
            are not finite; ranks that differ in their images; on the other ranks whatever is raised on one.
        ValueError: ``embed`` does not return (B, d), its network is in training mode, ``precision`` is unknown, or the
            group carries no tensors of the host.

    Example:
        >>> from pathlib import Path
        >>> import tempfile
        >>> from PIL import Image
        >>> path = Path(tempfile.mkdtemp()) / "red.png"
        >>> Image.new("RGB", (8, 16), "red").save(path)
        >>> colour = lambda images: images.mean(dim=(2, 3))
        >>> extract_features(colour, [Sample(path, pid=1, camid=1)], (16, 8)).features.shape
        torch.Size([1, 3])
    """
    if process_group is not None:
        check_backend(process_group, torch.device("cpu"), "features are", "name both, 'cpu:gloo,cuda:nccl'")
        labels = torch.tensor([(sample.pid, sample.camid) for sample in samples], device="cpu")
        given = ("batch_size", batch_size), ("the checksum of the labels", zlib.crc32(labels.numpy().tobytes()))
        require_same(process_group, given, "evaluate the same images in the same batches on all ranks")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}; it must be 'float32' or 'bfloat16'.")
    network = _owner(embed)
    modules = network.named_modules() if isinstance(network, nn.Module) else ()
    training = next((name for name, each in modules if each.training and (not name or _has_modes(each))), None)
    if training is not None:
        part = f"whose {training} is in" if training else "in"
        raise ValueError(
            f"embed is of a {type(network).__name__} {part} training mode, whose features depend on the batch; call "
            "its eval() first."
        )
    preprocessing = preprocessing or _preprocessing_of(network)
    if not samples:
        raise DanFastError("There are no images to embed; check that the split asked for is not empty.")
    device, part = torch.device(device), range(len(samples))
    if process_group is not None:
        batches = Division.of_images(process_group, len(range(0, len(samples), batch_size))).rows
        part = part[batches.start * batch_size : batches.stop * batch_size]
    rows, kept = [], []
    with (
        refused_by_all(process_group, DanFastError, "embed its images"),
        torch.inference_mode(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        reading = broken_images, cache, device, preprocessing, part
        loader = image_loader(samples, image_size, batch_size, workers, *reading)
        for number, (images, indices) in enumerate(loader, start=1):
            if progress is not None:
                progress(min(number * batch_size, len(part)), len(part))
            if len(images) == 0:
                continue
            features = embed(images)
            if not isinstance(features, Tensor):
                made = type(features).__name__
                raise ValueError(f"embed made a {made}; it must make a (B, d) tensor, as the embed method of a DAN.")
            if features.ndim != 2 or len(features) != len(images):
                raise ValueError(f"embed made {tuple(features.shape)} of {len(images)} images; it must make (B, d).")
            rows.append(features.to("cpu", torch.float32))
            if not rows[-1].isfinite().all():
                raise DanFastError(
                    "The network's features are not finite numbers: its training has diverged; use another checkpoint"
                    f"{', or float32' if precision == 'bfloat16' else ''}."
                )
            kept.extend(indices.tolist())
    of_ranks = gathered(process_group, (kept, rows[0].shape[1] if rows else 0))
    everywhere = [index for own, _ in of_ranks for index in own]
    if not everywhere:
        raise DanFastError(f"None of the {len(samples)} images can be read; the first is {samples[0].path}.")
    # Joined outside of inference mode, so that the result is an ordinary tensor.
    return Features(
        torch.cat([torch.empty(0, max(width for _, width in of_ranks), dtype=torch.float32, device="cpu"), *rows]),
        torch.tensor([samples[index].pid for index in everywhere], dtype=torch.int64, device="cpu"),
        torch.tensor([samples[index].camid for index in everywhere], dtype=torch.int64, device="cpu"),
        tuple(Path(samples[index].path) for index in everywhere),
        tuple(Path(samples[index].path) for index in sorted(set(range(len(samples))) - set(everywhere))),
        () if process_group is None else tuple(len(own) for own, _ in of_ranks),
    )


def _owner(embed: Any) -> Any:
    """The module or other object that embeds, where that can be known."""
    while isinstance(embed, partial | MethodType | FunctionType):
        if isinstance(embed, partial):
            embed = embed.func
        elif isinstance(embed, MethodType):
            embed = embed.__self__
        else:  # of torch.compile, or of a decorator
            embed = getattr(embed, "_torchdynamo_orig_callable", getattr(embed, "__wrapped__", None))
    return embed


def _has_modes(layer: nn.Module) -> bool:
    """Whether a layer by itself may give something else in training mode: it keeps statistics, or drops something."""
    # Of generalised-mean pooling, p is a parameter.
    rates = [rate for name in ("p", "drop_prob") if isinstance(rate := getattr(layer, name, 0), Real)]
    return bool(layer._buffers) or any(rates)


def _preprocessing_of(network: Any) -> Preprocessing:
    own = getattr(network, "preprocessing", None)
    if isinstance(own, Preprocessing):
        return own
    inside = network.modules() if isinstance(network, nn.Module) else ()
    found = [each.preprocessing for each in inside if isinstance(getattr(each, "preprocessing", None), Preprocessing)]
    return found[0] if found and all(each == found[0] for each in found) else IMAGENET
