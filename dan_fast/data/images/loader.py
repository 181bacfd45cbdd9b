"""From plans and samples to batches on a device: read in workers or from a cache, augmented there."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dan_fast.core.batches import BrokenImages, MiniBatch, Split
from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.data.images.augment import Draws, augment, draw, normalize
from dan_fast.data.images.cache import ImageCache
from dan_fast.data.images.feed import one_ahead, pinned
from dan_fast.data.images.packed import Packed
from dan_fast.data.images.reading import read_image
from dan_fast.data.images.transforms import resize
from dan_fast.data.images.workers import SentenceLoader
from dan_fast.data.sampler import BatchPlan, PlannedItem
from dan_fast.data.samples import Sample
from dan_fast.data.training_set import TrainingSet

# From the path of an image to its pixels; DanFastError if it is broken.
Read = Callable[[Path], Tensor]


def split_of(items: Sequence[PlannedItem], images: Tensor) -> Split:
    """The part of a mini-batch that was planned as n `items`, with their images, (n,3,H,W)."""
    kinds = [item.kind for item in items]
    return Split(
        images=images,
        labels=torch.tensor([item.label for item in items]),
        sample_ids=torch.tensor([-1 if item.kind == "labeled" else item.index for item in items]),
        num_labeled=kinds.count("labeled"),
        num_fed_back=kinds.count("fed_back"),
    )


class ImageSamples(Dataset):
    """Samples as (image, pid, camid, index); None in place of a broken image where these are skipped.

    Args:
        samples: what to read.
        read: from a path to the image returned.
        broken_images: "error" raises DanFastError at a broken image, "skip" returns None.
    """

    def __init__(
        self, samples: Sequence[Sample], read: Read = read_image, broken_images: BrokenImages = "error"
    ) -> None:
        self.samples = Packed(samples)
        self.read = read
        self.broken_images = _checked(broken_images)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int, int] | None:
        path, pid, camid = self.samples[index]
        try:
            return self.read(path), pid, camid, index
        except DanFastError:
            if self.broken_images == "error":
                raise
            return None


class Loader:
    """Batches on a device, on a GPU one of them prepared ahead; each iteration goes through all of them in order.

    On a CPU the thread that prepares would take turns with those that compute on the same cores, which costs more than
    it saves (docs/limits.md).

    Args:
        source: batches with uint8 images on the host.
        prepare: from such a batch to the one that is returned, on the device.
        device: of the returned batches.
    """

    def __init__(self, source: Collection[Any], prepare: Callable[[Any], Any], device: str | torch.device) -> None:
        self.source = source
        self.prepare = prepare
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        if self.device.type == "cpu":
            return (self.prepare(batch) for batch in self.source)
        return one_ahead(iter(self.source), self.prepare, self.device)


def image_loader(
    samples: Sequence[Sample],
    image_size: tuple[int, int],
    batch_size: int = 64,
    workers: int = 0,
    broken_images: BrokenImages = "error",
    cache: ImageCache | None = None,
    device: str | torch.device = "cpu",
    preprocessing: Preprocessing = IMAGENET,
    part: range | None = None,
) -> Loader:
    """Reads samples in their order for the evaluation, without augmentation.

    Args:
        samples: what to read.
        image_size: (height, width) in pixels.
        batch_size: images at a time.
        workers: processes that decode; 0 decodes in this one. None is started to read from a cache.
        broken_images: "error" raises DanFastError at a broken image, "skip" leaves it out of the batch.
        cache: holds or takes the decoded images; the result is the same to the last bit.
        device: where the images go.
        preprocessing: how images are resized and normalised for the network.
        part: which of the samples are read; all of them where it is None. A cache holds all of them.

    Returns:
        A loader of (images (n,3,H,W) float32 on `device`, indices (n,) int64 into `samples` on the CPU).
    """
    read = _reader([sample.path for sample in samples], image_size, preprocessing.interpolation, cache)
    dataset = ImageSamples(samples, broken_images=broken_images, read=read)
    # A partial, not a closure: workers that are not forked need to pickle it.
    collate = partial(_collate_samples, image_size=tuple(image_size))
    workers = workers if cache is None else 0
    source = SentenceLoader(dataset, collate, workers, batch_size=batch_size, sampler=part)
    device = torch.device(device)

    def prepare(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, indices = batch
        return normalize(pinned(images, device), preprocessing), indices

    return Loader(source, prepare, device)


def training_loader(
    training_set: TrainingSet,
    plans: Iterable[BatchPlan],
    image_size: tuple[int, int],
    workers: int = 0,
    broken_images: BrokenImages = "error",
    cache: ImageCache | None = None,
    device: str | torch.device = "cpu",
    preprocessing: Preprocessing = IMAGENET,
    shares: bool = False,
) -> Loader:
    """Reads and augments the batches of a plan in its order; given the rest of a plan, it resumes within an epoch.

    The images depend only on the plan and the device, neither on workers nor on a cache, and the state of the global
    generators stays as it is.

    Args:
        training_set: the samples the plan refers to.
        plans: what `BatchPlanner.plan_epoch` or `batches` returned, or the end of it.
        image_size, workers, cache, preprocessing: as of `image_loader`.
        broken_images: "error" raises DanFastError at a broken image, "skip" leaves it out and names it in
            `skipped`.
        device: where the batches go and images are augmented; to a GPU by way of page-locked memory.
        shares: whether the plans are a rank's shares of batches, of which other ranks may have the labelled images.

    Returns:
        A loader of one `MiniBatch` per plan. A part that is left without any labelled or fed-back image or, if it is a
        share, without any image raises DanFastError in either mode, because no loss could be computed on it.
    """
    paths = [sample.path for sample in (*training_set.labeled_samples, *training_set.unlabeled_samples)]
    read = _reader(paths, image_size, preprocessing.interpolation, cache)
    dataset = _PlannedBatches(training_set, image_size, broken_images, read, shares)
    workers = workers if cache is None else 0
    source = SentenceLoader(dataset, tuple, workers, batch_size=None, sampler=Packed(plans))
    device = torch.device(device)

    def prepare(batch: tuple[MiniBatch, tuple[Draws, ...]]) -> MiniBatch:
        (train, test, skipped), draws = tree_map_only(Tensor, lambda each: pinned(each, device), batch)
        parts = [
            part._replace(images=augment(part.images, drawn, preprocessing))
            for part, drawn in zip((train, test), draws, strict=False)
        ]
        return MiniBatch(parts[0], parts[1] if len(parts) > 1 else None, skipped)

    return Loader(source, prepare, device)


class _PlannedBatches(Dataset):
    """Maps a `BatchPlan` to its `MiniBatch` of uint8 images and the draws for each part."""

    def __init__(
        self,
        training_set: TrainingSet,
        image_size: tuple[int, int],
        broken_images: BrokenImages,
        read: Read,
        shares: bool,
    ) -> None:
        self.labeled, self.unlabeled = training_set.paths
        self.image_size = tuple(image_size)
        self.broken_images = _checked(broken_images)
        self.read = read
        self.shares = shares

    def __getitem__(self, plan: BatchPlan) -> tuple[MiniBatch, tuple[Draws, ...]]:
        skipped: list[str] = []
        parts = [self._split(items, skipped) for items in plan if items is not None]
        splits, draws = zip(*parts, strict=True)
        return MiniBatch(splits[0], splits[1] if len(splits) > 1 else None, tuple(skipped)), draws

    def _split(self, items: Sequence[PlannedItem], skipped: list[str]) -> tuple[Split, Draws]:
        images, kept, skipped_before = [], [], len(skipped)
        for item in items:
            path = (self.labeled if item.kind == "labeled" else self.unlabeled)[item.index]
            try:
                images.append(self.read(path))
            except DanFastError:
                if self.broken_images == "error":
                    raise
                skipped.append(str(path))
                continue
            kept.append(item)
        if not items:
            raise DanFastError("A rank's share of a batch holds no image: take fewer ranks or larger batches.")
        if not skipped[skipped_before:] and not self.shares and all(item.kind == "unlabeled" for item in items):
            raise DanFastError(
                "A part of a batch has no labelled image, as a rank's share may: pass shares=True where ranks take the "
                "step together."
            )
        if not kept or not self.shares and all(item.kind == "unlabeled" for item in kept):
            images = "images of a rank's share of a batch"
            if not self.shares:
                images = "labelled images of a batch, or of a rank's share of it,"
            raise DanFastError(f"All {images} are broken, {skipped[skipped_before]} the first; repair the dataset.")
        return split_of(kept, _stack(images, self.image_size)), draw([item.seed for item in kept], self.image_size)


def _reader(paths: Sequence[Path], image_size: tuple[int, int], interpolation: str, cache: ImageCache | None) -> Read:
    if cache is None:
        return v2.Compose([read_image, resize(image_size, interpolation)])
    if tuple(cache.image_size) != tuple(image_size):
        raise ValueError(f"the cache is of images of {cache.image_size} and not of {tuple(image_size)}")
    if cache.interpolation != interpolation:
        raise ValueError(f"the cache is of {cache.interpolation} images and not of {interpolation} ones")
    cache.add([path for path in paths if path not in cache])
    return cache.read


def _collate_samples(
    items: list[tuple[Tensor, int, int, int] | None], image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    read = [item for item in items if item is not None]
    indices = torch.tensor([index for _, _, _, index in read], dtype=torch.int64)
    return _stack([image for image, _, _, _ in read], image_size), indices


def _stack(images: list[Tensor], image_size: tuple[int, int]) -> Tensor:
    return torch.stack(images) if images else torch.empty(0, 3, *image_size, dtype=torch.uint8)


def _checked(broken_images: str) -> BrokenImages:
    if broken_images not in ("error", "skip"):
        raise DanFastError(f"broken_images is {broken_images!r}; set it to error or skip.")
    return broken_images
