"""Ways to feed images side by side: agreement first, then images per second taken in turn."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dan_fast.bench.timing import Timing, once, rounds
from dan_fast.bench.verdict import Bar, at_least
from dan_fast.core.preprocessing import STD
from dan_fast.data import (
    BatchPlanner,
    ImageCache,
    ReIDDataset,
    Sample,
    TrainingSet,
    image_loader,
    load_dataset,
    read_image,
    test_transform,
    train_transform,
    training_loader,
)
from dan_fast.data.sampler import BatchPlan
from dan_fast.data.synthetic import synthesize

PLAIN, DECODED, CACHED = CONTENDERS = ("plain", "decoded", "cached")
TRAINING, EVALUATION = USES = ("training", "evaluation")
# The factor over the plain DataLoader that the cache must reach.
_SPEEDUP = 5
# So many images are drawn; the files beyond them are copies, which are decoded like others.
_DRAWN = 64
# Of the pixels of augmented images, the share that may be apart, and by how many grey levels; see
# `dan_fast.data.images.augment.augment`.
_APART, _LEVELS = 1e-3, 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class FeedPlan:
    """What to measure.

    Attributes:
        file_sizes: height and width of the JPEG files.
        image_size: height and width they are resized to.
        images: files; each repetition goes through all of them.
        batch_size: images at a time.
        workers: processes that decode; the cache needs none but to be made.
        device: where the batches go.
        repeat: repetitions of each contender.
    """

    file_sizes: Sequence[tuple[int, int]] = ((128, 64), (256, 128))
    image_size: tuple[int, int] = (256, 128)
    images: int = 1024
    batch_size: int = 64
    workers: int = 2
    device: torch.device = torch.device("cpu")
    repeat: int = 7


@dataclass
class FeedRow:
    """A contender in one use on files of one size.

    Attributes:
        seconds: of a pass through all images.
        disagrees: how its batches differ from those of the plain loader, None if they do not. Such a row has no
            speed-up.
        apart: largest difference in grey levels, and the share of numbers that differ.
        build_seconds: what it took to decode the images into the cache, in no other figure.
        cache_bytes: size of that file.
        speedup: how many times as long the plain loader takes.
    """

    contender: str
    use: str
    file_size: tuple[int, int]
    image_size: tuple[int, int]
    images: int
    seconds: Timing = field(default_factory=Timing)
    disagrees: str | None = None
    apart: tuple[float, float] | None = None
    build_seconds: float | None = None
    cache_bytes: int | None = None
    speedup: float | None = None

    @property
    def rate(self) -> tuple[float, float, float]:
        """Images per second: median and quartiles."""
        lower, upper = self.seconds.quartiles
        return self.images / self.seconds.median, self.images / upper, self.images / lower

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["seconds"] = self.seconds.to_dict()
        content["images_per_second"] = dict(zip(("median", "q1", "q3"), self.rate, strict=True))
        return content


class PlainImages(Dataset):
    """Files as torchvision users read them: decoded by Pillow and transformed one at a time.

    Args:
        samples: the files.
        image_size: height and width.
        train: augment them.
        seeds: a seed for each file, so that augmented images can be compared; None draws as it comes.
    """

    def __init__(
        self, samples: Sequence[Sample], image_size: tuple[int, int], train: bool, seeds: dict[int, int] | None = None
    ) -> None:
        self.samples = samples
        self.transform = train_transform(image_size) if train else test_transform(image_size)
        self.seeds = seeds

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, pid, _ = self.samples[index]
        if self.seeds is not None:
            torch.default_generator.manual_seed(self.seeds[index])
        return self.transform(read_image(path)), pid


class FeedGroup:
    """All contenders on files of one size, drawn into a folder.

    Args:
        plan: what to measure.
        file_size: height and width of the files.
        folder: an empty one for files and cache.
        say: told what is going on.
    """

    def __init__(self, plan: FeedPlan, file_size: tuple[int, int], folder: Path, say: Say = lambda _: None) -> None:
        self.plan, self.file_size, self.folder, self.say = plan, file_size, folder, say
        self.rows = [
            FeedRow(contender, use, file_size, plan.image_size, plan.images) for use in USES for contender in CONTENDERS
        ]
        say(f"{_name(file_size)}: drawing images")
        self.samples = _draw_files(folder / "images", file_size, plan.images)
        root = folder / "images"
        self.training_set = TrainingSet([ReIDDataset("drawn", root, train=self.samples)])
        planner = BatchPlanner(self.training_set.labels, 0, batch_size=plan.batch_size)
        self.plans = planner.plan_epoch(0)
        self.cache = ImageCache(folder / "cache", plan.image_size, workers=plan.workers, say=say)

    def measure(self) -> list[FeedRow]:
        """The finished rows."""
        start = time.perf_counter()
        self.cache.add([sample.path for sample in self.samples])
        build_seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (self.folder / "cache").glob("*.npy"))
        passes = {index: self._passes(row) for index, row in enumerate(self.rows)}
        for index, row in enumerate(self.rows):
            self.say(f"{_name(self.file_size)}, {row.use}: {row.contender} is compared")
            if row.contender == CACHED:
                row.build_seconds, row.cache_bytes = build_seconds, size
            self._compare(row)
            # The first pass starts the workers.
            passes[index]()
        for number, turns in enumerate(rounds(dict.fromkeys(passes, self.plan.repeat)), start=1):
            self.say(f"{_name(self.file_size)}: repetition {number} of {self.plan.repeat}")
            for index in turns:
                self.rows[index].seconds.seconds.append(once(self.plan.device, passes[index]))
        set_feed_speedups(self.rows)
        return self.rows

    def _passes(self, row: FeedRow) -> Callable[[], None]:
        """One pass through all images; what it starts lives as long as the function."""
        if row.contender == PLAIN:
            loader = self._plain(row.use, persistent_workers=self.plan.workers > 0)
        else:
            loader = self._own(row)

        def run() -> None:
            for batch in loader:
                if row.contender == PLAIN:
                    images, pids = batch
                    batch = images.to(self.plan.device, non_blocking=True), pids.to(self.plan.device, non_blocking=True)
                del batch

        return run

    def _plain(self, use: str, seeds: dict[int, int] | None = None, **options: Any) -> DataLoader:
        train = use == TRAINING
        dataset = PlainImages(
            self.training_set.labeled_samples if train else self.samples, self.plan.image_size, train, seeds
        )
        if train:
            options["batch_sampler"] = [[item.index for item in _items(plan)] for plan in self.plans]
        else:
            options["batch_size"] = self.plan.batch_size
        return DataLoader(dataset, num_workers=self.plan.workers, pin_memory=self.plan.device.type == "cuda", **options)

    def _own(self, row: FeedRow) -> Any:
        cache = self.cache if row.contender == CACHED else None
        options = {"workers": self.plan.workers, "cache": cache, "device": self.plan.device}
        if row.use == TRAINING:
            return training_loader(self.training_set, self.plans, self.plan.image_size, **options)
        return image_loader(self.samples, self.plan.image_size, self.plan.batch_size, **options)

    def _compare(self, row: FeedRow) -> None:
        if row.contender == PLAIN:
            return
        seeds = {item.index: item.seed for plan in self.plans for item in _items(plan)}
        expected = (images for images, _ in self._plain(row.use, seeds))
        largest, different, numbers = 0.0, 0, 0
        with torch.random.fork_rng(devices=[]):
            for one, other in zip(expected, _images(self._own(row)), strict=True):
                if one.shape != other.shape:
                    row.disagrees = f"a batch is {tuple(other.shape)} and not {tuple(one.shape)}"
                    return
                levels = (one - other.cpu()).abs() * torch.tensor(STD)[:, None, None] * 255
                largest = max(largest, levels.max().item())
                different += int((levels > 1e-3).sum())
                numbers += levels.numel()
        row.apart = largest, different / numbers
        if row.use == EVALUATION and self.plan.device.type == "cpu" and largest > 0:
            row.disagrees = f"pixels are not equal, by {largest:.2g} grey levels"
        elif largest > _LEVELS + 1e-3 or row.apart[1] > _APART:
            row.disagrees = f"{row.apart[1]:.1e} of the pixels differ, by up to {largest:.2g} grey levels"


@contextmanager
def feed_group(plan: FeedPlan, file_size: tuple[int, int], say: Say = lambda _: None) -> Iterator[FeedGroup]:
    """A `FeedGroup` in a temporary folder."""
    with TemporaryDirectory(prefix="dan-fast-bench-") as folder:
        yield FeedGroup(plan, file_size, Path(folder), say)


def set_feed_speedups(rows: Sequence[FeedRow]) -> None:
    """Ratios of medians to the plain loader's in the same use; none with a row that disagrees."""
    plain = {(row.use, row.file_size): row.seconds.median for row in rows if row.contender == PLAIN}
    for row in rows:
        if row.contender != PLAIN and not row.disagrees:
            row.speedup = plain[row.use, row.file_size] / row.seconds.median


def feed_bars(rows: Sequence[FeedRow], file_sizes: Sequence[tuple[int, int]]) -> list[Bar]:
    """What the cache must reach, in both uses and at all sizes."""
    found = {(row.use, row.file_size): row.speedup for row in rows if row.contender == CACHED}
    return [
        at_least(f"{use} from the cache, {_name(size)} files, over plain", _SPEEDUP, found.get((use, size)))
        for size in file_sizes
        for use in USES
    ]


def _images(loader: Any) -> Iterator[Tensor]:
    for first, second, *_ in loader:
        if isinstance(first, Tensor):
            yield first
        else:
            yield first.images if second is None else torch.cat([first.images, second.images])


def _items(plan: BatchPlan) -> tuple:
    return plan.meta_train + (plan.meta_test or ())


def _draw_files(root: Path, size: tuple[int, int], images: int) -> tuple[Sample, ...]:
    drawn = root / "drawn"
    (manifest,) = synthesize(
        drawn, ["campus"], identities=_DRAWN // 4, cameras=2, images_per_camera=2, image_size=size, test_fraction=0
    )
    people = load_dataset(manifest).train
    samples = []
    for number in range(images):
        person = people[number % len(people)]
        path = root / f"{number:06d}.jpg"
        shutil.copyfile(person.path, path)
        samples.append(Sample(path, person.pid, person.camid))
    return tuple(samples)


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
