"""`dan-fast bench data`: images a second of each loader in each use, on files of each size."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from jsonargparse.typing import NonNegativeInt, PositiveInt

from dan_fast.bench.benchmark import Bar, Benchmark, at_least, sizes_of
from dan_fast.bench.data.feeds import CACHED, CONTENDERS, EVALUATION, PLAIN, USES, Feeds, apart, too_far
from dan_fast.bench.rows import WHOLE, Row
from dan_fast.bench.timing import Say, Turn, take_turns
from dan_fast.core.errors import DanFastError

# The factor over the plain DataLoader that the cache must reach.
_SPEEDUP = 5

Size = tuple[int, int]


def rate_of(row: Row) -> dict[str, float]:
    """Images per second."""
    lower, upper = row.whole.quartiles
    seconds = {"median": row.whole.median, "q1": upper, "q3": lower}
    return {name: row.of["images"] / value for name, value in seconds.items()}


@dataclass(kw_only=True)
class DataBenchmark(Benchmark):
    """Time a plain DataLoader, this package's, and this package's with a cache, after checking that they agree.

    Args:
        files: Height and width of the JPEG files, with commas between.
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
        self.files: list[Size] = sizes_of("files", self.files)

    def groups(self, say: Say) -> Iterator[list[Row]]:
        for file_size in self.files:
            yield self._group(file_size, say)

    def _group(self, file_size: Size, say: Say) -> list[Row]:
        """All contenders in both uses, on files of one size."""
        of = {"file_size": file_size, "image_size": self.image_size, "images": self.images}
        of |= {"apart": None, "build_seconds": None, "cache_bytes": None}
        # Bytes read as uint8 and written as float32.
        moved = {WHOLE: self.images * 3 * math.prod(self.image_size) * (1 + 4)}
        rows = [
            Row(name, of | {"use": use}, (WHOLE,), f"{name}, {use}", model_bytes=moved)
            for use in USES
            for name in CONTENDERS
        ]
        with TemporaryDirectory(prefix="dan-fast-bench-") as folder:
            say(f"{_name(file_size)}: drawing images")
            feeds = Feeds(Path(folder), file_size, self.image_size, self.images, self.batch, self.workers, self.place)
            feeds.cache.say = say
            start = time.perf_counter()
            feeds.cache.add([sample.path for sample in feeds.samples])
            build_seconds = time.perf_counter() - start
            cache_bytes = sum(path.stat().st_size for path in (Path(folder) / "cache").glob("*.npy"))
            turns = []
            for row in rows:
                say(f"{_name(file_size)}: {row.name} is compared")
                if row.contender == CACHED:
                    row.of |= {"build_seconds": build_seconds, "cache_bytes": cache_bytes}
                    row.notes.append(f"made in {build_seconds:.1f} s, {cache_bytes / 1e6:.0f} MB, not counted")
                if row.contender != PLAIN:
                    self.compare(row, feeds)
                run = partial(feeds.go_through, feeds.loader(row.contender, row.of["use"]))
                # The first pass starts the workers.
                run()
                turns.append(Turn(row, WHOLE, run, self.repeat))
            take_turns(self.place, turns, say, moved[WHOLE])
        return rows

    def compare(self, row: Row, feeds: Feeds) -> None:
        """Its batches with those of the plain loader."""
        row.compared_with = PLAIN
        found = apart(feeds.plain(row.of["use"], compared=True), feeds.loader(row.contender, row.of["use"]))
        if isinstance(found, str):
            row.disagrees = found
            return
        row.of["apart"] = largest, share = found
        if row.of["use"] == EVALUATION and self.place.type == "cpu" and largest > 0:
            row.disagrees = f"pixels are not equal, by {largest:.2g} grey levels"
        else:
            row.disagrees = too_far(largest, share)
        some = f": up to {largest:.2g} grey levels in {share:.1e} of the pixels"
        row.agreement = some if largest else ": equal pixels"

    def title(self, rows: Sequence[Row]) -> str:
        files, size = (" x ".join(map(str, rows[0].of[each])) for each in ("file_size", "image_size"))
        return f"{self.images} JPEG files of {files} to {size}, batches of {self.batch}, {self.workers} workers"

    def figures(self, row: Row) -> dict[str, Any]:
        return {"images_per_second": rate_of(row), "speedup": row.ratio(PLAIN)}

    def cells(self, row: Row) -> dict[str, str]:
        rate = rate_of(row)
        spread = f"{rate['median']:.0f} ({rate['q1']:.0f}..{rate['q3']:.0f})"
        return {"images/s": spread, "us an image": f"{1e6 / rate['median']:.0f}"}

    def legend(self, rows: Sequence[Row]) -> list[str]:
        return [
            *super().legend(rows),
            "plain: a torchvision DataLoader; decoded: without a cache; cached: from it, without workers.",
        ]

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        found = {(row.of["use"], row.of["file_size"]): row.ratio(PLAIN) for row in rows if row.contender == CACHED}
        return [
            at_least(f"{use} from the cache, {_name(size)} files, over plain", _SPEEDUP, found.get((use, size)))
            for size in self.files
            for use in USES
        ]


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
