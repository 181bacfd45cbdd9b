"""What all benchmarks have in common: from settings to groups of rows, tables, a file, bars and the verdict."""

import json as json_text
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dan_fast.bench.machine import environment
from dan_fast.bench.rows import Row, plain, shown
from dan_fast.bench.timing import Say
from dan_fast.core.devices import resolve_device
from dan_fast.core.errors import DanFastError
from dan_fast.core.files import require_own_json, write_text

SCHEMA = 1
MEANING = {
    "seconds": "of a pass; forward is without recording for autograd; repetitions of the contenders in turn",
    "model_bytes": "a model: the bytes that a pass cannot do without",
    "limit_seconds": "model_bytes / bandwidth and flop / rate, which no run can go below; over_limit: over the larger",
    "rate": "operations/s of the fastest of torch's and NumPy's products of 2048 x 2048, on a GPU of 8 of 4096 x 4096 "
    "in a row, in the type of the arithmetic; null where it bounds nothing, as for TF32 convolutions on a GPU",
    "bandwidth_share": "model_bytes / copy bandwidth / time; above 1 where a cache serves",
    "bandwidth": "bytes/s read and written by Tensor.copy_, taken in turn with the contenders",
    "speedup": "median of the other / median of this one, pass by pass; none without agreement",
    "extra_bytes": "peak_bytes less returned_bytes, the result",
    "compile_seconds": "of the first calls, which are in no other figure",
    "errors": "the difference of each result",
}
LEGEND = (
    "ms: median (quartiles, repetitions) of a step or call. Two figures: forward / forward + backward.",
    "over limit: time over the larger of model bytes at the copy bandwidth and operations at the best product's rate.",
    "of copy: model bytes at the measured copy bandwidth over the time. vs: how many times as long that one takes.",
)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


class Bar(NamedTuple):
    """A requirement, its limit as a sentence, the figure (None if it was not measured), and whether it is met."""

    name: str
    limit: str
    value: float | None
    met: bool

    @property
    def verdict(self) -> str:
        return "not measured" if self.value is None else "met" if self.met else "NOT met"


def at_least(name: str, least: float, value: float | None, unit: str = "times") -> Bar:
    """A figure that must not be smaller."""
    return Bar(name, f"at least {least:g} {unit}".rstrip(), value, value is not None and value >= least)


def at_most(name: str, most: float, value: float | None, unit: str = "times", limit: str = "") -> Bar:
    """A figure that must not be larger; `limit` says so, by default in the unit."""
    return Bar(name, limit or f"at most {most:g} {unit}", value, value is not None and value <= most)


@dataclass(kw_only=True)
class Benchmark(ABC):
    """A subject: its settings, which are the flags of `dan-fast bench NAME`, and what it measures.

    Args:
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        json: Also write everything to this file, which is new or from an earlier benchmark; it is rewritten after every
            table.
        repeat: Number of times that each pass of a contender is timed: a step or call, all images, or an epoch.
        threads: CPU threads of this process; 0 keeps PyTorch's own number.
        check: Fail if a bar is missed or was not measured.

    Raises:
        DanFastError: a setting does not fit.
    """

    name: ClassVar[str]
    # What the keys of the file mean; MEANING has those that all benchmarks share.
    meaning: ClassVar[dict[str, str]]
    bars_title: ClassVar[str] = "Bars"
    # What tells the rows of a table apart: these of `Row.of`.
    columns: ClassVar[tuple[str, ...]] = ()
    # The contenders whom others are compared with, in rows that have the same of these of `Row.of`.
    against: ClassVar[tuple[str, ...]] = ()
    within: ClassVar[tuple[str, ...]] = ()

    device: str = "auto"
    json: str | None = None
    repeat: PositiveInt = 7
    threads: NonNegativeInt = 0
    check: bool = False

    def __post_init__(self) -> None:
        self.place = resolve_device(self.device)

    @property
    def peak_meaning(self) -> str:
        if self.place.type == "cuda":
            return "torch.cuda.max_memory_allocated during the run, less what was allocated before; tensors only"
        return (
            "highest resident memory of the process during the run (VmHWM), less what was resident before; it counts "
            "tensors, scratch of libraries and pages that were freed again, after a warm-up and malloc_trim"
        )

    @abstractmethod
    def groups(self, say: Say) -> Iterator[tuple[str, list[Row]]]:
        """Measures; each group is a table with a title. A contender that cannot run leaves the reason in its row."""

    @abstractmethod
    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """What the rows have to reach; a row that disagrees has no figure."""

    def rivals(self, row: Row, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """Whom a row of a group is compared with: the fastest of those that have a name."""
        like = [other for other in rows if all(other.of[name] == row.of[name] for name in self.within)]
        return {name: [other for other in like if other.contender == name] for name in self.against}

    def set_ratios(self, rows: Sequence[Row]) -> None:
        """Ratios of medians to the fastest of each kind of rivals, pass by pass; none with a row that disagrees."""
        for row in rows:
            row.speedup = {}
            for name, others in {} if row.disagrees else self.rivals(row, rows).items():
                others = [other for other in others if other is not row and not other.disagrees]
                for kind, timing in row.seconds.items():
                    times = [other.seconds[kind].median for other in others if kind in other.seconds]
                    if times:
                        row.speedup.setdefault(name, {})[kind] = min(times) / timing.median

    def measure(self, say: Say = lambda _: None) -> Iterator[tuple[str, list[Row]]]:
        """The groups with their ratios."""
        for title, rows in self.groups(say):
            self.set_ratios(rows)
            yield title, rows

    def figures(self, row: Row) -> dict[str, Any]:
        """Figures of a row beyond those that all have, by their keys in the file."""
        return {}

    def cells(self, row: Row) -> dict[str, str]:
        """Further columns of a table."""
        return {}

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What is written into the file beside the rows."""
        return {}

    def more_tables(self, rows: Sequence[Row]) -> dict[str, list[dict[str, str]]]:
        """Title -> rows of column -> cell."""
        return {}

    def legend(self) -> list[str]:
        """Lines below the tables."""
        return [*LEGEND, f"extra MB: {self.peak_meaning}; less the result."]

    def run(self) -> None:
        """Measures, prints and writes.

        Raises:
            DanFastError: the file cannot be written or holds something else, or with `check` a bar is missed.
        """
        # Wide enough for the tables where the output goes into a file.
        console = Console() if Console().is_terminal else Console(width=200)
        if self.json is not None:
            require_own_json(self.json, ["benchmark", "rows"])
        rows, threads = [], torch.get_num_threads()
        torch.set_num_threads(self.threads or threads)
        try:
            found = environment(self.place)
            # Before minutes of measuring: the folder may not be writable.
            self._write(found, rows, complete=False)
            with console.status("") as status:
                for title, group in self.measure(status.update):
                    rows += group
                    self.print_rows(console, title, group)
                    self._write(found, rows, complete=False)
            self._write(found, rows, complete=True)
        finally:
            torch.set_num_threads(threads)
        bars = self.bars(rows)
        for title, table in self.more_tables(rows).items():
            print_table(console, title, table)
        for line in self.legend():
            console.print(line, highlight=False)
        verdicts = [
            {"bar": b.name, "limit": b.limit, "measured": shown(b.value, ".3g"), "verdict": b.verdict} for b in bars
        ]
        print_table(console, self.bars_title, verdicts)
        known = (f"{name} {value}" for name, value in found.items() if value is not None)
        console.print(escape(", ".join(known)), highlight=False)
        missed = [f"{bar.name}: {bar.verdict}" for bar in bars if not bar.met]
        if self.check and missed:
            raise DanFastError(f"{len(missed)} of {len(bars)} bars are missed: {'; '.join(missed)}.")

    def _write(self, found: dict[str, Any], rows: Sequence[Row], complete: bool) -> None:
        """The file as it is so far: `complete` is false in one that an interrupted run leaves."""
        if self.json is None:
            return
        # What was made of the settings is among them.
        settings = {name: value for name, value in vars(self).items() if name[0] != "_"}
        settings["device"] = settings.pop("place")
        content = {
            "schema": SCHEMA,
            "benchmark": self.name,
            "complete": complete,
            "environment": found,
            "settings": settings,
            "meaning": MEANING | self.meaning | {"peak_bytes": self.peak_meaning},
            **self.more(rows),
            "rows": [row.to_dict() | self.figures(row) for row in rows],
            "bars": [bar._asdict() | {"verdict": bar.verdict} for bar in self.bars(rows)],
        }
        write_text(Path(self.json), json_text.dumps(plain(content), indent=2) + "\n")

    def print_rows(self, console: Console, title: str, rows: Sequence[Row]) -> None:
        """The table of a group and what is to be said of its rows."""
        table = []
        for row in rows:
            words = {"contender": row.contender} | {name: str(row.of[name] or "-") for name in self.columns}
            table.append(words | row.cells() | self.cells(row))
        print_table(console, title, table)
        timed = next((row for row in rows if row.bandwidth), None)
        if timed:
            rate = f", matrix products {timed.rate / 1e9:.1f} GFLOP/s" if timed.rate else ""
            words = f"copy bandwidth {timed.bandwidth / 1e9:.1f} GB/s, read and written{rate}"
            console.print(words, highlight=False)
        for row in rows:
            for remark in row.remarks():
                console.print(f"{row.name}: {escape(remark)}", highlight=False)


def print_table(console: Console, title: str, rows: Sequence[dict[str, str]]) -> None:
    """Words stand on the left and numbers on the right, "-" where a row lacks a column; empty columns are left out."""
    table = Table(title=title, title_justify="left")
    columns = {name: [row.get(name, "-") for row in rows] for row in rows for name in row}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    for name, cells in columns.items():
        words = any(cell[:1].isalpha() for cell in cells)
        table.add_column(name, justify="left" if words else "right", no_wrap=not any(" " in cell for cell in cells))
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, cells))
    console.print(table)


def one_of(option: str, text: str, choices: Iterable[str]) -> list[str]:
    """The words of an option, with commas between, each once.

    Raises:
        DanFastError: one is not among the choices; names the option.
    """
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in choices:
            raise DanFastError(f"{option}: {word!r} is not one of {', '.join(choices)}.")
    return list(dict.fromkeys(words))


def contenders_of(text: str, choices: Iterable[str]) -> list[str]:
    """The contenders of `--contenders`; "all" stands for all of them."""
    return list(choices) if text == "all" else one_of("contenders", text, choices)


def sizes_of(text: str) -> list[tuple[int, int]]:
    """The heights and widths of `--files 128x64,256x128`.

    Raises:
        DanFastError: one is not a size of an image that can be drawn.
    """
    sizes = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d+)x(\d+)\s*", word)
        if found is None or int(found[1]) < 32 or int(found[2]) < 16:
            raise DanFastError(f"files: {word!r} is not a height and a width of at least 32x16, such as 128x64.")
        sizes.append((int(found[1]), int(found[2])))
    return list(dict.fromkeys(sizes))
