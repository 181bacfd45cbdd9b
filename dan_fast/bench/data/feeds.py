"""Ways to feed images: torchvision's, and this package's with and without its cache."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dan_fast import data
from dan_fast.core.preprocessing import STD
from dan_fast.data import BatchPlan, BatchPlanner, ImageCache, ReIDDataset, Sample, TrainingSet
from dan_fast.data.synthetic import synthesize

PLAIN, DECODED, CACHED = CONTENDERS = ("plain", "decoded", "cached")
TRAINING, EVALUATION = USES = ("training", "evaluation")
# So many images are drawn; the files beyond them are copies, which are decoded like others.
_DRAWN = 64
# Of the pixels of augmented images, the share that may be apart, and by how many grey levels; see
# `dan_fast.data.images.augment.augment`.
_APART, _LEVELS = 1e-3, 2


class PlainImages(Dataset):
    """Files as torchvision users read them: decoded by Pillow and transformed one at a time.

    With `seeds`, one for each file, augmented images can be compared; None draws as it comes.
    """

    def __init__(self, samples: Sequence[Sample], transform: Any, seeds: Sequence[int] | None) -> None:
        self.samples, self.transform, self.seeds = samples, transform, seeds

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, pid, _ = self.samples[index]
        if self.seeds is not None:
            torch.default_generator.manual_seed(self.seeds[index])
        return self.transform(data.read_image(path)), pid


def planned(training_set: TrainingSet, plans: Iterable[BatchPlan]) -> tuple[list[Sample], list[int]]:
    """The images of mini-batches, S before S~, with their classes, and the seeds of their draws."""
    items = [item for plan in plans for part in plan for item in part or ()]
    labeled, others = training_set.labeled_samples, training_set.unlabeled_samples
    sources = (labeled if item.kind == "labeled" else others for item in items)
    samples = [source[item.index]._replace(pid=item.label) for source, item in zip(sources, items, strict=True)]
    return samples, [item.seed for item in items]


class Feeds:
    """The loaders of all contenders on files of one size, height and width, which are drawn into an empty folder."""

    def __init__(self, folder: Path, file_size: tuple[int, int], image_size: tuple[int, int], images: int,
                 batch: int, workers: int, device: torch.device) -> None:  # fmt: skip
        self.image_size, self.batch, self.workers, self.device = image_size, batch, workers, device
        self.samples = _draw_files(folder / "images", file_size, images)
        self.training_set = TrainingSet([ReIDDataset("drawn", folder / "images", train=self.samples)])
        self.plans = BatchPlanner(self.training_set.labels, 0, batch_size=batch).plan_epoch(0)
        self.cache = ImageCache(folder / "cache", image_size, workers=workers)

    def loader(self, contender: str, use: str) -> Any:
        """What a user would go through."""
        if contender == PLAIN:
            return self.plain(use, persistent_workers=self.workers > 0)
        cache = self.cache if contender == CACHED else None
        options = {"workers": self.workers, "cache": cache, "device": self.device}
        if use == TRAINING:
            return data.training_loader(self.training_set, self.plans, self.image_size, **options)
        return data.image_loader(self.samples, self.image_size, self.batch, **options)

    def plain(self, use: str, compared: bool = False, **options: Any) -> DataLoader:
        """torch's loader of `PlainImages`; on the draws of this package's to be compared with it."""
        samples, transform, seeds = self.samples, data.test_transform(self.image_size), None
        if use == TRAINING:
            samples, drawn = planned(self.training_set, self.plans)
            transform, seeds = data.train_transform(self.image_size), drawn if compared else None
        options |= {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        return DataLoader(PlainImages(samples, transform, seeds), self.batch, **options)

    def go_through(self, loader: Any) -> None:
        """One pass through all images."""
        for batch in loader:
            if isinstance(loader, DataLoader):
                batch = [part.to(self.device, non_blocking=True) for part in batch]
            del batch


def apart(plain: Iterable[Any], loader: Iterable[Any], std: Sequence[float] = STD) -> tuple[float, float] | str:
    """How far the images of this package's loader are from those of torch's; both have divided by `std`.

    Returns:
        The largest difference in grey levels, and the share of numbers that differ; or what else is another.
    """
    largest, different, numbers = 0.0, 0, 0
    with torch.random.fork_rng(devices=[]):
        for (one, classes), (other, others) in zip(plain, map(_images_and_classes, loader), strict=True):
            if one.shape != other.shape:
                return f"a batch is {tuple(other.shape)} and not {tuple(one.shape)}"
            if others is not None and not torch.equal(classes, others.cpu()):
                return "classes of a batch are others"
            levels = (one - other.cpu()).abs() * torch.tensor(std)[:, None, None] * 255
            if not levels.isfinite().all():
                return "a batch holds numbers that are not finite"
            largest = max(largest, levels.max().item())
            different += int((levels > 1e-3).sum())
            numbers += levels.numel()
    return largest, different / numbers


def too_far(largest: float, share: float) -> str | None:
    """Why augmented images that are so far `apart` are not the same."""
    if largest > _LEVELS + 1e-3 or share > _APART:
        return f"{share:.1e} of the pixels differ, by up to {largest:.2g} grey levels"
    return None


def _images_and_classes(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Of a mini-batch S before S~; what is tested on has no classes."""
    first, second, *_ = batch
    if isinstance(first, Tensor):
        return first, None
    parts = [first] if second is None else [first, second]
    return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


def _draw_files(root: Path, size: tuple[int, int], images: int) -> tuple[Sample, ...]:
    (manifest,) = synthesize(root / "drawn", ["campus"], identities=_DRAWN // 4, cameras=2, images_per_camera=2,
                             image_size=size, test_fraction=0)  # fmt: skip
    people = data.load_dataset(manifest).train
    samples = [people[number % len(people)]._replace(path=root / f"{number:06d}.jpg") for number in range(images)]
    for number, sample in enumerate(samples):
        shutil.copyfile(people[number % len(people)].path, sample.path)
    return tuple(samples)
