"""`dan-fast bench data`: from settings to figures."""

import json as json_text
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dan_fast.bench.data import PLAIN, FeedPlan, FeedRow, feed_bars, feed_group
from dan_fast.bench.machine import environment
from dan_fast.bench.settings import cpu_threads, output_console, print_environment
from dan_fast.bench.verdict import all_met, print_bars
from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_text
from dan_fast.training.build import resolve_device

SCHEMA = 1
MEANING = {
    "plain": "torch's DataLoader: JPEG decoded by Pillow, torchvision transforms one image at a time, collated",
    "decoded": "dan_fast without a cache: JPEG decoded and resized in the same number of workers, augmented in batches",
    "cached": "dan_fast with a cache: read from the memory-mapped file, augmented in batches; no workers",
    "training": "flip, pad and crop, change of colour, normalised; the batches of one epoch's plan",
    "evaluation": "normalised only, in the order of the files",
    "seconds": "of a pass through all images; repetitions of the contenders in turn",
    "workers": "those of plain are kept from pass to pass, decoded starts its own in each, as training does",
    "files": "synthetic pedestrians as JPEG, in the page cache of the system like the cache itself",
    "apart": "largest difference from plain in grey levels, and the share of numbers that differ, on the same draws",
    "speedup": "median of plain / median of this one in the same use; none without agreement",
    "build_seconds": "to decode all images into the cache, once, in no other figure",
}


def bench_data(
    device: str = "auto",
    json: str | None = None,
    files: str = "128x64,256x128",
    image_size: tuple[PositiveInt, PositiveInt] = (256, 128),
    images: PositiveInt = 1024,
    batch: PositiveInt = 64,
    workers: NonNegativeInt = 2,
    repeat: PositiveInt = 7,
    threads: NonNegativeInt = 0,
    check: bool = False,
    console: Console | None = None,
) -> bool:
    """Time a plain DataLoader, this package's, and this package's with a cache, after checking that they agree.

    Args:
        device: Where the batches go: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        json: Also write everything into this file, anew after every table.
        files: Height and width of the JPEG files, with commas between.
        image_size: Height and width to which images are resized.
        images: Number of files.
        batch: Images at a time.
        workers: Processes that decode; 0 decodes in this one.
        repeat: Passes through all images by each contender.
        threads: CPU threads of this process; 0 leaves PyTorch's own number.
        check: Fail if a bar is missed or was not measured.
        console: Where the tables go.

    Returns:
        Whether every bar is met.

    Raises:
        DanFastError: a setting does not fit, the file cannot be written, or with `check` a bar is missed.
    """
    if not 2 <= batch <= images:
        raise DanFastError(f"batch is {batch}; it must be from 2 to images, {images}.")
    plan = FeedPlan(
        _sizes(files),
        (int(image_size[0]), int(image_size[1])),
        int(images),
        int(batch),
        int(workers),
        resolve_device(device),
        int(repeat),
    )
    with cpu_threads(int(threads)):
        return _measure(plan, json, check, output_console(console))


def _sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d+)x(\d+)\s*", word)
        if found is None or int(found[1]) < 32 or int(found[2]) < 16:
            raise DanFastError(f"files: {word!r} is not a height and a width of at least 32x16, such as 128x64.")
        sizes.append((int(found[1]), int(found[2])))
    return list(dict.fromkeys(sizes))


def _measure(plan: FeedPlan, json: str | None, check: bool, console: Console) -> bool:
    found = environment(plan.device)
    rows: list[FeedRow] = []

    def write(complete: bool) -> None:
        if json is not None:
            content = _report(plan, found, rows, complete)
            write_text(Path(json), json_text.dumps(content, indent=2) + "\n")

    # Now rather than after minutes of measuring: the folder may not be writable.
    write(complete=False)
    for size in plan.file_sizes:
        with console.status("") as status, feed_group(plan, size, status.update) as group:
            measured = group.measure()
        rows += measured
        _print_rows(console, plan, measured)
        write(complete=False)
    write(complete=True)
    console.print(
        "images/s: median (quartiles, repetitions). plain: a torchvision DataLoader; decoded: without a cache; cached: "
        "from it, without workers.",
        highlight=False,
    )
    bars = feed_bars(rows, plan.file_sizes)
    print_bars(console, "Bars", bars)
    print_environment(console, found)
    return all_met(bars, check)


def _report(plan: FeedPlan, found: dict[str, Any], rows: list[FeedRow], complete: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "benchmark": "data",
        "complete": complete,
        "environment": found,
        "settings": {
            "device": str(plan.device),
            "files": [list(size) for size in plan.file_sizes],
            "image_size": list(plan.image_size),
            "images": plan.images,
            "batch": plan.batch_size,
            "workers": plan.workers,
            "repeat": plan.repeat,
        },
        "meaning": MEANING,
        "rows": [row.to_dict() for row in rows],
        "bars": [bar._asdict() | {"verdict": bar.verdict} for bar in feed_bars(rows, plan.file_sizes)],
    }


def _print_rows(console: Console, plan: FeedPlan, rows: Sequence[FeedRow]) -> None:
    files, size = (" x ".join(map(str, each)) for each in (rows[0].file_size, rows[0].image_size))
    table = Table(
        title=f"{plan.images} JPEG files of {files} to {size}, batches of {plan.batch_size}, {plan.workers} workers",
        title_justify="left",
    )
    for name in ("use", "contender"):
        table.add_column(name, no_wrap=True)
    for name in ("images/s", "us an image", "vs plain"):
        table.add_column(name, justify="right")
    for row in rows:
        median, lower, upper = row.rate
        table.add_row(
            row.use,
            row.contender,
            f"{median:.0f} ({lower:.0f}..{upper:.0f}, n={len(row.seconds.seconds)})",
            f"{1e6 / median:.0f}",
            "-" if row.speedup is None else f"{row.speedup:.2f}",
        )
    console.print(table)
    for row in rows:
        for remark in _remarks(row):
            console.print(f"{row.contender}, {row.use}: {escape(remark)}", highlight=False)


def _remarks(row: FeedRow) -> list[str]:
    remarks = []
    if row.disagrees:
        remarks.append(f"disagrees with {PLAIN}: {row.disagrees}; no ratio is given")
    elif row.apart is not None:
        largest, share = row.apart
        agreement = f"up to {largest:.2g} grey levels in {share:.1e} of the pixels" if largest else "equal pixels"
        remarks.append(f"agrees with {PLAIN}: {agreement}")
    if row.build_seconds is not None and row.cache_bytes is not None:
        remarks.append(f"made in {row.build_seconds:.1f} s, {row.cache_bytes / 1e6:.0f} MB, not counted")
    return remarks
