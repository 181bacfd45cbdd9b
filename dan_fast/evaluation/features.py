"""Features of a list of images, with the identities and cameras they are scored by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.data.images.cache import ImageCache
from dan_fast.data.images.loader import image_loader
from dan_fast.data.samples import Sample


class Features(NamedTuple):
    """Embedded images.

    Attributes:
        features: (n, d) float32 on the CPU.
        pids: (n,) int64 identities.
        camids: (n,) int64 cameras.
        paths: the n image files.
        skipped: the files that could not be decoded and were left out.
    """

    features: Tensor
    pids: Tensor
    camids: Tensor
    paths: tuple[Path, ...]
    skipped: tuple[Path, ...] = ()

    def select(self, indices: Tensor) -> Features:
        """The images at the given (k,) int64 indices, in that order."""
        paths = tuple(self.paths[index] for index in indices.tolist())
        return Features(self.features[indices], self.pids[indices], self.camids[indices], paths)


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
    preprocessing: Preprocessing = IMAGENET,
) -> Features:
    """Embed images in order, without gradients.

    The caller puts the model into evaluation mode: with batch normalisation or dropout in training mode the
    features would depend on the batch.

    Args:
        embed: maps (B, 3, H, W) float32 images on ``device`` to (B, d) features; ``DAN.embed``, for example.
        samples: images to embed.
        image_size: (height, width) in pixels.
        batch_size: images at a time.
        workers: processes that decode images; 0 decodes in this one.
        device: where ``embed`` runs.
        precision: ``"bfloat16"`` runs ``embed`` under autocast.
        broken_images: an unreadable image is an error, or is left out of the result.
        progress: called with (images read, images in all) at each batch.
        cache: holds or takes the decoded images; the features are the same.
        preprocessing: how images are resized and normalised for the network: ``DAN.preprocessing``.

    Raises:
        DanFastError: no samples, none readable, or one unreadable where ``broken_images`` is ``"error"``.
        ValueError: ``embed`` does not return (B, d), or ``precision`` is unknown.

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
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}; it must be 'float32' or 'bfloat16'.")
    if not samples:
        raise DanFastError("There are no images to embed; check that the split asked for is not empty.")
    device = torch.device(device)
    rows, kept = [], []
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        loader = image_loader(samples, image_size, batch_size, workers, broken_images, cache, device, preprocessing)
        for number, (images, indices) in enumerate(loader, start=1):
            if progress is not None:
                progress(min(number * batch_size, len(samples)), len(samples))
            if len(images) == 0:
                continue
            features = embed(images)
            if features.ndim != 2 or len(features) != len(images):
                raise ValueError(f"embed made {tuple(features.shape)} of {len(images)} images; it must make (B, d).")
            rows.append(features.to("cpu", torch.float32))
            kept.extend(indices.tolist())
    if not kept:
        raise DanFastError(f"None of the {len(samples)} images can be read; the first is {samples[0].path}.")
    # Joined outside of inference mode, so that the result is an ordinary tensor.
    return Features(
        torch.cat(rows),
        torch.tensor([samples[index].pid for index in kept], dtype=torch.int64),
        torch.tensor([samples[index].camid for index in kept], dtype=torch.int64),
        tuple(Path(samples[index].path) for index in kept),
        tuple(Path(samples[index].path) for index in sorted(set(range(len(samples))) - set(kept))),
    )
