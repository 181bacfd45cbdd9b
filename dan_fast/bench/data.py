"""`dan-fast bench data`: images a second of each loader in each use, on files of each size."""

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dan_fast import data
from dan_fast.bench.benchmark import Bar, Benchmark, at_least, sizes_of
from dan_fast.bench.rows import WHOLE, Row
from dan_fast.bench.timing import Say, take_turns
from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import STD
from dan_fast.data import BatchPlan, BatchPlanner, ImageCache, ReIDDataset, Sample, TrainingSet
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
        (manifest,) = synthesize(folder / "drawn", ["campus"], identities=_DRAWN // 4, cameras=2, images_per_camera=2,
                                 image_size=file_size, test_fraction=0)  # fmt: skip
        people, self.samples = data.load_dataset(manifest).train, []
        for number in range(images):
            person = people[number % len(people)]
            self.samples.append(person._replace(path=folder / f"{number:06d}.jpg"))
            shutil.copyfile(person.path, self.samples[-1].path)
        self.training_set = TrainingSet([ReIDDataset("drawn", folder, train=tuple(self.samples))])
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


def apart(
    plain: Iterable[Any], loader: Iterable[Any], std: Sequence[float] = STD
) -> tuple[str | None, tuple[float, float] | None]:
    """How far the images of this package's loader are from those of torch's; both have divided by `std`.

    Returns:
        Why they are not the same, None where they are; and the largest difference in grey levels with the share of
        numbers that differ, None where something else than pixels is another.
    """
    largest, different, numbers = 0.0, 0, 0
    with torch.random.fork_rng(devices=[]):
        for (one, classes), (other, others) in zip(plain, map(_images_and_classes, loader), strict=True):
            if one.shape != other.shape:
                return f"a batch is {tuple(other.shape)} and not {tuple(one.shape)}", None
            if others is not None and not torch.equal(classes, others.cpu()):
                return "classes of a batch are others", None
            levels = (one - other.cpu()).abs() * torch.tensor(std)[:, None, None] * 255
            if not levels.isfinite().all():
                return "a batch holds numbers that are not finite", None
            largest = max(largest, levels.max().item())
            different += int((levels > 1e-3).sum())
            numbers += levels.numel()
    share = different / numbers
    far = largest > _LEVELS + 1e-3 or share > _APART
    return f"{share:.1e} of the pixels differ, by up to {largest:.2g} grey levels" if far else None, (largest, share)


def _images_and_classes(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Of a mini-batch S before S~; what is tested on has no classes."""
    first, second, *_ = batch
    if isinstance(first, Tensor):
        return first, None
    parts = [first] if second is None else [first, second]
    return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


@dataclass(kw_only=True)
class DataBenchmark(Benchmark):
    """Time a plain DataLoader, this package's, and this package's with a cache, after checking that they agree.

    Args:
        files: Height and width of the JPEG files, separated by commas.
        image_size: Height and width to which images are resized.
        images: Number of files.
        batch: Images at a time.
        workers: Processes that decode; 0 decodes in this one.
    """

    name: ClassVar[str] = "data"
    columns: ClassVar[tuple[str, ...]] = ("use",)
    against: ClassVar[tuple[str, ...]] = (PLAIN,)
    within: ClassVar[tuple[str, ...]] = ("use",)
    meaning: ClassVar[dict[str, str]] = {
        "plain": "torch's DataLoader: JPEG decoded by Pillow, torchvision transforms one image at a time, collated",
        "decoded": "dan_fast without a cache: decoded and resized in the same number of workers, augmented in batches",
        "cached": "dan_fast with a cache: read from the memory-mapped file, augmented in batches; no workers",
        "training": "flip, pad and crop, change of colour, normalised; the batches of one epoch's plan",
        "evaluation": "normalised only, in the order of the files",
        "seconds": "of a pass through all images; repetitions of the contenders in turn",
        "workers": "those of plain are kept from pass to pass, decoded starts its own in each, as training does",
        "files": "synthetic pedestrians as JPEG, in the page cache of the system like the cache itself",
        "apart": "largest difference from plain in grey levels, and the share of numbers that differ, on equal draws",
        "speedup": "median of plain / median of this one in the same use; none without agreement",
        "model_bytes": "a model: pixels read as uint8 and written as float32; decoding and augmenting are not in it",
        "build_seconds": "to decode all images into the cache, once, in no other figure",
    }

    files: str = "128x64,256x128"
    image_size: tuple[PositiveInt, PositiveInt] = (256, 128)
    images: PositiveInt = 1024
    batch: PositiveInt = 64
    workers: NonNegativeInt = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.batch <= self.images:
            raise DanFastError(f"batch is {self.batch}; it must be from 2 to images, {self.images}.")
        self.files = sizes_of(self.files)

    def groups(self, say: Say) -> Iterator[tuple[str, list[Row]]]:
        for file_size in self.files:
            files, size = (" x ".join(map(str, each)) for each in (file_size, self.image_size))
            title = f"{self.images} JPEG files of {files} to {size}, batches of {self.batch}, {self.workers} workers"
            with TemporaryDirectory(prefix="dan-fast-bench-") as folder:
                yield title, self._group(file_size, Path(folder), say)

    def _group(self, file_size: tuple[int, int], folder: Path, say: Say) -> list[Row]:
        """All contenders in both uses, on files of one size."""
        files, rows = "{}x{}".format(*file_size), []
        say(f"{files}: drawing images")
        feeds = Feeds(folder, file_size, self.image_size, self.images, self.batch, self.workers, self.place)
        feeds.cache.say = say
        start = time.perf_counter()
        feeds.cache.add([sample.path for sample in feeds.samples])
        build_seconds = time.perf_counter() - start
        cache_bytes = sum(path.stat().st_size for path in (folder / "cache").glob("*.npy"))
        # Bytes read as uint8 and written as float32.
        moved = self.images * 3 * math.prod(self.image_size) * (1 + 4)
        for use in USES:
            for contender in CONTENDERS:
                say(f"{files}: {contender}, {use} is compared")
                of = {"file_size": file_size, "image_size": self.image_size, "images": self.images, "apart": None}
                of |= {"build_seconds": None, "cache_bytes": None, "use": use}
                row = Row(contender, of, (WHOLE,), f"{contender}, {use}", model_bytes={WHOLE: moved})
                if contender == CACHED:
                    row.of |= {"build_seconds": build_seconds, "cache_bytes": cache_bytes}
                    row.notes.append(f"made in {build_seconds:.1f} s, {cache_bytes / 1e6:.0f} MB, not counted")
                if contender != PLAIN:
                    self._compare(row, feeds)
                run = partial(feeds.go_through, feeds.loader(contender, use))
                # The first pass starts the workers.
                run()
                row.calls = {WHOLE: (run, self.repeat)}
                rows.append(row)
        take_turns(self.place, rows, say, moved)
        return rows

    def _compare(self, row: Row, feeds: Feeds) -> None:
        """Its batches with those of the plain loader."""
        use = row.of["use"]
        row.compared_with = PLAIN
        row.disagrees, row.of["apart"] = apart(feeds.plain(use, compared=True), feeds.loader(row.contender, use))
        if row.of["apart"]:
            largest, share = row.of["apart"]
            some = f": up to {largest:.2g} grey levels in {share:.1e} of the pixels"
            row.agreement = some if largest else ": equal pixels"
            if use == EVALUATION and self.place.type == "cpu" and largest:
                row.disagrees = f"pixels are not equal, by {largest:.2g} grey levels"

    def figures(self, row: Row) -> dict[str, Any]:
        lower, upper = row.whole.quartiles
        seconds = {"median": row.whole.median, "q1": upper, "q3": lower}
        rate = {name: row.of["images"] / value for name, value in seconds.items()}
        return {"images_per_second": rate, "speedup": row.ratio(PLAIN)}

    def cells(self, row: Row) -> dict[str, str]:
        rate = self.figures(row)["images_per_second"]
        spread = f"{rate['median']:.0f} ({rate['q1']:.0f}..{rate['q3']:.0f})"
        return {"images/s": spread, "us an image": f"{1e6 / rate['median']:.0f}"}

    def legend(self) -> list[str]:
        which = "plain: a torchvision DataLoader; decoded: without a cache; cached: from it, without workers."
        return [*super().legend(), which]

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        found = {(row.of["file_size"], row.of["use"]): row.ratio(PLAIN) for row in rows if row.contender == CACHED}
        return [
            at_least(f"{use} from the cache, {size[0]}x{size[1]} files, over plain", _SPEEDUP, found.get((size, use)))
            for size in self.files
            for use in USES
        ]
