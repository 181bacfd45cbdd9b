"""The figures as tables on the console and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dan_fast.bench.agreement import TOLERANCES
from dan_fast.bench.contenders import KERNELS
from dan_fast.bench.machine import PEAK_MEANING
from dan_fast.bench.results import Row
from dan_fast.bench.settings import milliseconds, print_environment
from dan_fast.bench.timing import BACKWARD, FORWARD
from dan_fast.bench.verdict import Bar, print_bars
from dan_fast.core.files import write_text

SCHEMA = 1
_RIVALS = ("literal_autograd", "literal_in_place", "best_pytorch")
MEANING = {
    "seconds": "a step; forward is without recording for autograd; repetitions of the contenders in turn",
    "step": "pure: from one common state, the new memories are returned",
    "module": "the memory steps its own state; `steps` steps and the write of what they left pending, over `steps`",
    "model_bytes": (
        "a model: what a step cannot do without, 2 (module) or 3 (step) passes over (s1+s2) d numbers forward, one "
        "more with backward"
    ),
    "bandwidth_share": "model_bytes / copy bandwidth / time; above 1 where a cache serves",
    "floor_seconds": "model_bytes / copy bandwidth, and the operations of gflops / float32_rate: the longer one bounds",
    "float32_rate": "of a GPU by its multiprocessors and highest clock; null where products are not of float32",
    "bandwidth": "bytes/s read and written by Tensor.copy_, taken in turn with the contenders",
    "gflops": "of the products of score space, scores, commit and backward; not of the literal loops",
    "speedup": (
        "median of the other / median of this one, pass by pass; best_pytorch: the faster of score_space and "
        "score_space_compiled in the same use; none without agreement"
    ),
    "peak_extra_bytes": "peak_bytes less returned_bytes, the new memories that a pure step returns",
}


class Report(NamedTuple):
    """All of a run.

    Attributes:
        environment: versions and hardware.
        settings: what was asked for.
        rows: the figures.
        bars: what had to be reached.
        prediction: of a model, see `dan_fast.bench.bars.predict`.
        complete: False in a file that an interrupted run leaves.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: Sequence[Row]
    bars: Sequence[Bar]
    prediction: dict[str, Any]
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        device = self.settings["device"].partition(":")[0]
        dtypes = dict.fromkeys(row.dtype for row in self.rows)
        return {
            "schema": SCHEMA,
            "benchmark": "memory",
            "complete": self.complete,
            "environment": self.environment,
            "settings": self.settings,
            "meaning": MEANING | {"peak_bytes": PEAK_MEANING[device]},
            "tolerances": {name: TOLERANCES[getattr(torch, name)]._asdict() for name in dtypes},
            "rows": [row.to_dict() for row in self.rows],
            "bars": [bar._asdict() | {"verdict": bar.verdict} for bar in self.bars],
            "prediction": self.prediction,
        }

    def write(self, path: str | Path) -> None:
        """Whole or not at all.

        Raises:
            DanFastError: the file cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The table of one size and dtype."""
    first = rows[0]
    size, bandwidth = first.size, next((row.bandwidth for row in rows if row.bandwidth), None)
    title = (
        f"{first.dtype}, {first.scale:g} x slots: {size.labeled_slots} and {size.unlabeled_slots} slots of "
        f"{size.key_dim}, {size.batch} + {size.batch} samples a step"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in ("use", "forward ms", "fwd + bwd ms", "extra MB", "model MB", "of copy", "GFLOP/s"):
        table.add_column(name, justify="right" if name != "use" else "left")
    for name in ("vs autograd", "vs in place", "vs PyTorch"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(escape, _cells(row)))
    console.print(table)
    if bandwidth:
        console.print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, read and written")
    for row in rows:
        floors = row.floors(BACKWARD)
        if row.contender == KERNELS and "operations" in floors:
            by_bytes, by_operations = (f"{floors[by] * 1e3:.2f} ms by {by}" for by in ("bytes", "operations"))
            rate = f"{row.float32_rate / 1e12:.1f} TFLOP/s in float32"
            console.print(
                f"floors of forward + backward ({row.use}): {by_bytes} at that bandwidth, {by_operations} at {rate}",
                highlight=False,
            )
    for row in rows:
        for remark in _remarks(row):
            console.print(f"{row.contender} ({row.use}): {escape(remark)}", highlight=False)


def _cells(row: Row) -> tuple[str, ...]:
    kind = BACKWARD if BACKWARD in row.seconds else FORWARD
    content = row.to_dict()
    share, gflops = row.bandwidth_share(kind), row.gflops(kind)
    measured = kind in row.seconds
    return (
        row.contender,
        row.use,
        milliseconds(row.seconds.get(FORWARD)),
        milliseconds(row.seconds.get(BACKWARD)),
        "-" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 1e6:.1f}",
        f"{content['model_bytes'][kind] / 1e6:.0f}" if measured else "-",
        "-" if share is None else f"{share:.1%}",
        "-" if gflops is None else f"{gflops:.1f}",
        *(_speedup(row, rival) for rival in _RIVALS),
    )


def _speedup(row: Row, rival: str) -> str:
    ratios = row.speedup.get(rival, {})
    # Forward first; a "-" where only the other was measured.
    shown = [f"{ratios[kind]:.3g}" if kind in ratios else "-" for kind in (FORWARD, BACKWARD)]
    return " / ".join(shown) if ratios else "-"


def _remarks(row: Row) -> list[str]:
    remarks = []
    if row.disagrees:
        remarks.append(f"disagrees with {row.compared_with}: {row.disagrees}; no ratio is given")
    elif row.compared_with:
        remarks.append(f"agrees with {row.compared_with}, largest difference {max(row.errors.values()):.1e}")
    for reason in dict.fromkeys(row.left_out.values()):
        passes = [kind.replace("_", " + ") for kind, why in row.left_out.items() if why == reason]
        remarks.append(f"left out ({', '.join(passes)}): {reason}")
    if row.compile_seconds is not None:
        remarks.append(f"compiled in {row.compile_seconds:.1f} s, not counted")
    return remarks + row.notes


def print_summary(console: Console, report: Report, device_type: str) -> None:
    """What the ratios and figures are, the bars, the prediction and the machine."""
    console.print(
        "ms: median (quartiles, repetitions) a step. Ratios: forward / forward + backward. "
        "of copy: model bytes at the measured copy bandwidth over the time.",
        highlight=False,
    )
    console.print(f"extra MB: {PEAK_MEANING[device_type]}; less the new memories a pure step returns.", highlight=False)
    print_bars(console, "Bars: float32, 1 x slots", report.bars)
    prediction = report.prediction
    table = Table(title="PREDICTION, nothing here was measured: forward + backward", title_justify="left")
    columns = {"bytes_ms": "bytes ms", "operations_ms": "operations ms", "with_scan_ms": "with scan ms"}
    for name in ("GPU", "dtype", "x slots", *columns.values()):
        table.add_column(name)
    for row in prediction["rows"]:
        table.add_row(row["gpu"], row["dtype"], f"{row['scale']:g}", *(f"{row[key]:.3f}" for key in columns))
    console.print(table)
    console.print(prediction["formula"], highlight=False)
    print_environment(console, report.environment)
