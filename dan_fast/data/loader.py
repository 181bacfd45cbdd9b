"""From plans and samples to tensors: decoding and augmentation, in this process or in workers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dan_fast.data.images import read_image
from dan_fast.data.sampler import BatchPlan, PlannedItem
from dan_fast.data.samples import Sample
from dan_fast.data.training_set import TrainingSet
from dan_fast.data.transforms import test_transform, train_transform
from dan_fast.errors import DanFastError

BrokenImages = Literal["error", "skip"]


class Split(NamedTuple):
    """One part of a mini-batch; its n images are the labelled, then the fed-back, then the unlabelled ones.

    Attributes:
        images: (n,3,H,W) float32.
        labels: (n,) int64: class, pseudo label of a fed-back image, -1 for an unlabelled one.
        sample_ids: (n,) int64: place in `TrainingSet.unlabeled_samples`, -1 for a labelled image.
        num_labeled: number of labelled images.
        num_fed_back: number of fed-back images.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    num_labeled: int
    num_fed_back: int


class MiniBatch(NamedTuple):
    """S in `meta_train`, S~ in `meta_test` (None if not split), and the paths of broken images left out."""

    meta_train: Split
    meta_test: Split | None
    skipped: tuple[str, ...]


class ImageSamples(Dataset):
    """Samples as (image, pid, camid, index); None in place of a broken image where these are skipped.

    Args:
        samples: what to read.
        transform: from uint8 (3,h,w) to the image returned.
        broken_images: "error" raises DanFastError at a broken image, "skip" returns None.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Tensor], Tensor],
        broken_images: BrokenImages = "error",
    ) -> None:
        self.samples = tuple(samples)
        self.transform = transform
        self.broken_images = _checked(broken_images)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int, int] | None:
        path, pid, camid = self.samples[index]
        try:
            return self.transform(read_image(path)), pid, camid, index
        except DanFastError:
            if self.broken_images == "error":
                raise
            return None


def image_loader(
    samples: Sequence[Sample],
    image_size: tuple[int, int],
    batch_size: int = 64,
    workers: int = 0,
    broken_images: BrokenImages = "error",
) -> DataLoader:
    """Reads samples in their order for the evaluation, without augmentation.

    Args:
        samples: what to read.
        image_size: (height, width) in pixels.
        batch_size: images at a time.
        workers: processes that decode; 0 decodes in this one.
        broken_images: "error" raises DanFastError at a broken image, "skip" leaves it out of the batch.

    Returns:
        A loader of (images (n,3,H,W) float32, indices (n,) int64 into `samples`).
    """
    dataset = ImageSamples(samples, test_transform(image_size), broken_images)
    # A partial, not a closure: workers that are not forked need to pickle it.
    collate = partial(_collate_samples, image_size=image_size)
    return _SentenceLoader(dataset, collate, workers, batch_size=batch_size)


def training_loader(
    training_set: TrainingSet,
    plans: Sequence[BatchPlan],
    image_size: tuple[int, int],
    workers: int = 0,
    broken_images: BrokenImages = "error",
    pin_memory: bool = False,
) -> DataLoader:
    """Reads and augments the batches of a plan in its order; the rest of a plan resumes within an epoch.

    The images depend on the plan alone, not on the workers, and the state of the global generators stays as
    it is.

    Args:
        training_set: the samples the plan refers to.
        plans: what `BatchPlanner.plan_epoch` returned, or the end of it.
        image_size: (height, width) in pixels.
        workers: processes that decode; 0 decodes in this one.
        broken_images: "error" raises DanFastError at a broken image, "skip" leaves it out and names it in
            `skipped`.
        pin_memory: put the tensors into page-locked memory, for faster copies to a GPU.

    Returns:
        A loader of one `MiniBatch` per plan. A part that is left without any labelled or fed-back image
        raises DanFastError in either mode: no classification loss could be computed on it.
    """
    dataset = _PlannedBatches(training_set, image_size, broken_images)
    return _SentenceLoader(dataset, _as_planned, workers, batch_size=None, sampler=list(plans), pin_memory=pin_memory)


class _PlannedBatches(Dataset):
    """Maps a `BatchPlan` to its `MiniBatch`."""

    def __init__(self, training_set: TrainingSet, image_size: tuple[int, int], broken_images: BrokenImages) -> None:
        self.labeled = training_set.labeled_samples
        self.unlabeled = training_set.unlabeled_samples
        self.image_size = image_size
        self.transform = train_transform(image_size)
        self.broken_images = _checked(broken_images)

    def __getitem__(self, plan: BatchPlan) -> MiniBatch:
        skipped: list[str] = []
        # devices=[]: the transforms draw from the CPU generator only; asking for CUDA's would initialise it.
        with torch.random.fork_rng(devices=[]):
            train = self._split(plan.meta_train, skipped)
            test = None if plan.meta_test is None else self._split(plan.meta_test, skipped)
        return MiniBatch(train, test, tuple(skipped))

    def _split(self, items: Sequence[PlannedItem], skipped: list[str]) -> Split:
        images, kept, skipped_before = [], [], len(skipped)
        for item in items:
            path = (self.labeled if item.kind == "labeled" else self.unlabeled)[item.index].path
            try:
                image = read_image(path)
            except DanFastError:
                if self.broken_images == "error":
                    raise
                skipped.append(str(path))
                continue
            # Not torch.manual_seed, which would seed CUDA's generators too, and these are not restored here.
            torch.default_generator.manual_seed(item.seed)
            images.append(self.transform(image))
            kept.append(item)
        kinds = [item.kind for item in kept]
        if kinds.count("unlabeled") == len(kinds):
            raise DanFastError(
                f"All labelled images of a batch are broken, {skipped[skipped_before]} the first; repair the dataset."
            )
        return Split(
            images=_stack(images, self.image_size),
            labels=torch.tensor([item.label for item in kept]),
            sample_ids=torch.tensor([-1 if item.kind == "labeled" else item.index for item in kept]),
            num_labeled=kinds.count("labeled"),
            num_fed_back=kinds.count("fed_back"),
        )


class _Sentences(Dataset):
    """Hands a DanFastError on as an item: raised in a worker, it would arrive with its traceback as text."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except DanFastError as error:
            return DanFastError(*error.args)


class _SentenceLoader(DataLoader):
    """A DataLoader out of which a DanFastError comes as it was raised, with workers and without."""

    def __init__(self, dataset: Dataset, collate: Callable[[Any], Any], workers: int, **options: Any) -> None:
        super().__init__(
            _Sentences(dataset),
            collate_fn=collate,
            num_workers=workers,
            # Else each iteration would draw the workers' base seed from the global generator.
            generator=torch.Generator(),
            worker_init_fn=_ignore_interrupt,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, DanFastError):
                raise batch
            yield batch


def _as_planned(batch: MiniBatch | DanFastError) -> MiniBatch | DanFastError:
    return batch


def _collate_samples(
    items: list[tuple[Tensor, int, int, int] | None | DanFastError], image_size: tuple[int, int]
) -> tuple[Tensor, Tensor] | DanFastError:
    for item in items:
        if isinstance(item, DanFastError):
            return item
    read = [item for item in items if item is not None]
    indices = torch.tensor([index for _, _, _, index in read], dtype=torch.int64)
    return _stack([image for image, _, _, _ in read], image_size), indices


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides what to save and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stack(images: list[Tensor], image_size: tuple[int, int]) -> Tensor:
    return torch.stack(images) if images else torch.empty(0, 3, *image_size)


def _checked(broken_images: str) -> BrokenImages:
    if broken_images not in ("error", "skip"):
        raise DanFastError(f"broken_images is {broken_images!r}; set it to error or skip.")
    return broken_images
