"""Features of images from a checkpoint, read and resized as the evaluation does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor

from dan_fast.core.batches import BrokenImages
from dan_fast.core.devices import resolve_device
from dan_fast.core.errors import DanFastError
from dan_fast.core.terminal import bar_of
from dan_fast.data.images.loader import image_loader
from dan_fast.data.images.reading import decode_image, read_image
from dan_fast.data.images.transforms import resize
from dan_fast.data.samples import Sample
from dan_fast.nn import DAN
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.training.build import trained_network

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"
# Called with (images done, images in all).
Show: TypeAlias = Callable[[int, int], None]
# A list of more batches than these gets a bar on a terminal.
_LONG = 10
# What features are returned as, whatever torch.set_default_dtype and torch.set_default_device say.
_ROWS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class FeatureExtractor:
    """Features of images by the network of a checkpoint, for a tracker, a search or a notebook.

    They are `F.normalize` of those that `dan-fast evaluate` ranks: images are read, resized and normalised by the same
    code. The last bits of a row can depend on what else is in its batch. On a CPU, features from the same batches, that
    is, from the same list with the same `batch_size` (128 there by default), are equal to the last bit.

    Args:
        checkpoint: the checkpoint.pt or chosen.pt of a run, a folder that `dan-fast share` has written, or a
            `dan_fast.nn.DAN`, of which a copy is taken.
        device: "auto" takes the GPU where there is one; or "cpu", "cuda", "cuda:1".
        batch_size: images at a time.
        workers: processes that decode where all images are files; 0 decodes in this one.
        broken_images: "error" raises at an image that cannot be decoded, "skip" leaves a row of NaN in its place.

    Attributes:
        network: the `dan_fast.nn.DAN`, in eval mode on `device`.
        device: where it runs.
        image_size: (height, width) to which images are resized.
        preprocessing: how they are resized and normalised.
        size: C, the numbers of a feature.
        weights: the hash that tells the network from others; indexes, files of features and exported networks name it
            too.

    Raises:
        DanFastError: a checkpoint that is absent, truncated or of another version, or a device that is not there.
        TypeError: a module that is not a DAN.

    Example:
        >>> extract = FeatureExtractor(DAN(2, "resnet18", image_size=(32, 16)), device="cpu")
        >>> crops = [np.zeros((64, 32, 3), np.uint8), Image.new("RGB", (30, 70), "red")]
        >>> features = extract(crops)
        >>> features.shape, features.norm(dim=1).allclose(torch.ones(2))
        (torch.Size([2, 512]), True)
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | DAN,
        device: str = "auto",
        batch_size: int = 64,
        *,
        workers: int = 0,
        broken_images: BrokenImages = "error",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if broken_images not in ("error", "skip"):
            raise ValueError(f"broken_images must be 'error' or 'skip', got {broken_images!r}")
        if not isinstance(checkpoint, str | os.PathLike | DAN):
            raise TypeError(
                f"checkpoint must be a path or a dan_fast.nn.DAN, got {type(checkpoint).__name__}: hand the part of it "
                "that gives maps to DAN as its backbone, or take dan_fast.evaluation.extract_features"
            )
        self.device = resolve_device(device)
        network = deepcopy(checkpoint) if isinstance(checkpoint, DAN) else trained_network(checkpoint)[0]
        self.network = network.eval().to(self.device, torch.float32)
        self.image_size = network.image_size
        self.preprocessing = network.preprocessing
        self.size: int = network.classifier.in_features
        self.batch_size = batch_size
        self.workers = workers
        self.broken_images = broken_images

    @property
    def weights(self) -> str:
        # Of the network as it is now: whoever holds it may change it.
        return weights_hash(self.network)

    def __call__(self, images: ImageLike | Iterable[ImageLike], progress: Show | None = None) -> Tensor:
        """The features of images, in their order.

        Args:
            images: one image or several of them, also of different kinds and sizes: a path; a PIL image; a uint8
                (H,W,3) array in RGB (for OpenCV's BGR give `frame[..., ::-1]`); a uint8 (3,H,W) tensor in RGB. These
                are resized and normalised. A floating (B,3,H,W) tensor is taken as it is: it has to be of `image_size`
                and normalised as `preprocessing` says.
            progress: called with (images done, images in all) after each batch. Without it, a list of more than ten
                batches shows a progress bar on a terminal.

        Returns:
            (N,C) float32 on the CPU, rows of length 1; one image makes one row, no image (0,C). With `broken_images`
            "skip" the row of an image that cannot be decoded is NaN, and no other row is.

        Raises:
            DanFastError: an image that cannot be decoded, which is named by its path or its place in the list; or a
                network whose features are not finite.
            TypeError: something that is not an image, or numbers of another kind than uint8.
            ValueError: an array, a tensor or a batch of another shape.
        """
        images = _listed(images)
        total, rows = len(images), [torch.empty(0, self.size, **_ROWS)]
        with _bar(total, _LONG * self.batch_size) if progress is None else nullcontext(progress) as show:
            done = 0
            for features in self.batches(images):
                rows.append(features)
                done += len(features)
                show(done, total)
        return torch.cat(rows)

    def batches(self, images: ImageLike | Iterable[ImageLike]) -> Iterator[Tensor]:
        """The same features, one batch of `batch_size` images after the other, for lists of any length.

        From an iterator, such as a camera whose frames do not end, that many images are taken at a time; with
        `workers`, all.

        Example:
            for rows in extract.batches(paths):
                index.add(rows.numpy())
        """
        if isinstance(images, Iterator) and self.workers == 0:
            return self._of_stream(images)
        images = _listed(images)
        if isinstance(images, Tensor):
            return self._of_ready(images)
        _check(images, 0)
        return self._of_images(images, 0)

    def _of_stream(self, images: Iterator[ImageLike]) -> Iterator[Tensor]:
        start = 0
        while share := _listed(islice(images, self.batch_size)):
            _check(share, start)
            yield from self._of_images(share, start)
            start += len(share)

    def _of_ready(self, images: Tensor) -> Iterator[Tensor]:
        if images.ndim != 4 or images.shape[1:] != (3, *self.image_size):
            raise ValueError(
                f"a floating batch must be (B, 3, {self.image_size[0]}, {self.image_size[1]}), got "
                f"{tuple(images.shape)}; images that are still to be resized and normalised are uint8"
            )
        return (self._embed(batch.to(self.device, torch.float32)) for batch in images.split(self.batch_size))

    def _of_images(self, images: Sequence[ImageLike], start: int) -> Iterator[Tensor]:
        """Of images that `_check` has seen, the first of which is called images[start]."""
        if not images:
            return
        files = all(isinstance(image, str | os.PathLike) for image in images)
        names = images if files else [str(place) for place in range(len(images))]
        loader = image_loader(
            [Sample(Path(name), -1, -1) for name in names],
            self.image_size,
            self.batch_size,
            self.workers,
            self.broken_images,
            cache=None if files else _InMemory(images, start, self.image_size, self.preprocessing.interpolation),
            device=self.device,
            preprocessing=self.preprocessing,
        )
        for first, (batch, places) in zip(range(0, len(images), self.batch_size), loader, strict=True):
            rows = torch.full((min(self.batch_size, len(images) - first), self.size), torch.nan, **_ROWS)
            if len(places):
                rows[places - first] = self._embed(batch)
            yield rows

    def _embed(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            features = self.network.embed(images).to("cpu", torch.float32)
        # Outside of inference mode, so that the result is an ordinary tensor.
        features = F.normalize(features)
        if not features.isfinite().all():
            raise DanFastError(
                "The network's features are not finite numbers: its training has diverged, or so are the images it was "
                "given; use another checkpoint."
            )
        return features


class _InMemory:
    """Images of a list in the place of a cache of decoded ones: each is read by its place, and resized then."""

    def __init__(
        self, images: Sequence[ImageLike], start: int, image_size: tuple[int, int], interpolation: str
    ) -> None:
        self.image_size, self.interpolation = image_size, interpolation
        self._images, self._start, self._resize = images, start, resize(image_size, interpolation)

    def __contains__(self, path: Path) -> bool:
        return True

    def add(self, paths: Sequence[Path]) -> None:
        """Nothing: it contains everything."""

    def read(self, path: Path) -> Tensor:
        """The (3,H,W) uint8 image of the place that `path` names."""
        place = int(path.name)
        image = self._images[place]
        if isinstance(image, str | os.PathLike):
            return self._resize(read_image(Path(image)))
        return self._resize(decode_image(image, f"images[{self._start + place}]"))


def _listed(images: Any) -> Sequence[ImageLike] | Tensor:
    """Several images as a list, floating ones as the tensor they are."""
    if isinstance(images, Tensor) and images.is_floating_point():
        return images
    single = isinstance(images, str | os.PathLike | Image.Image)
    if single or (isinstance(images, Tensor | np.ndarray) and images.ndim in (2, 3)):
        return [images]
    if isinstance(images, list | tuple):
        return images
    if isinstance(images, Tensor | np.ndarray):
        return list(images)
    # Whatever gives them one by one may use one buffer for all.
    return [deepcopy(image) if isinstance(image, np.ndarray | Tensor | Image.Image) else image for image in images]


def _check(images: Iterable[Any], start: int) -> None:
    """Refuse what is no image before anything is computed; whether it can be decoded shows when it is read."""
    for place, image in enumerate(images, start):
        if isinstance(image, str | os.PathLike | Image.Image):
            continue
        if not isinstance(image, Tensor | np.ndarray) or image.dtype not in (torch.uint8, np.uint8):
            kind = image.dtype if isinstance(image, Tensor | np.ndarray) else type(image).__name__
            raise TypeError(f"images[{place}] must be a path, a PIL image or a uint8 array or tensor, got {kind}")
        if image.ndim != 3 or image.shape[0 if isinstance(image, Tensor) else 2] != 3:
            wanted = "tensor must be (3, H, W)" if isinstance(image, Tensor) else "array must be (H, W, 3)"
            raise ValueError(f"images[{place}]: a uint8 {wanted} in RGB, got {tuple(image.shape)}")


@contextmanager
def _bar(total: int, long: int) -> Iterator[Show]:
    console = Console(stderr=True)
    shown = total > long and (console.is_terminal or console.is_jupyter)
    with bar_of(console, transient=True, disable=not shown) as bar:
        task = bar.add_task("Features", total=total)
        yield lambda done, _: bar.update(task, completed=done)
