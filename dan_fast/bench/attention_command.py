"""`dan-fast bench attention`: from settings to figures."""

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dan_fast.bench.attention import HeadGroup, HeadPlan, HeadRow, head_bars, head_bytes
from dan_fast.bench.attention_contenders import CONTENDERS, KERNELS, LAYOUTS, TOLERANCES, MapSize
from dan_fast.bench.machine import PEAK_MEANING, environment
from dan_fast.bench.settings import (
    cpu_threads,
    dtypes_of,
    milliseconds,
    one_of,
    output_console,
    print_environment,
)
from dan_fast.bench.timing import BACKWARD, FORWARD
from dan_fast.bench.verdict import all_met, print_bars
from dan_fast.core.files import write_text
from dan_fast.training.build import resolve_device

SCHEMA = 1
MEANING = {
    "seconds": "of one call; forward is without recording for autograd; repetitions of the contenders in turn, each "
    "after an untimed one and with empty caches",
    "forward_backward": "with the gradients of the map, the six weights and the CAM weight",
    "half precision": "a map in half precision meets float32 weights under autocast, as in training",
    "errors": (
        "against the reference in float64 on the same numbers: the larger of the difference's shares of the largest "
        "number and of the norm"
    ),
    "model_bytes": "a model: what the head cannot do without, X read forward, X read and dX written backward",
    "bandwidth_share": "model_bytes / copy bandwidth / time; above 1 where a cache serves",
    "bandwidth": "bytes/s read and written by Tensor.copy_, taken in turn with the contenders",
    "speedup": "median of the other / median of this one, pass by pass; none without agreement",
    "extra_bytes": "peak_bytes less returned_bytes, the results and gradients, dX among them",
}


def bench_attention(
    device: str = "auto",
    json: str | None = None,
    dtype: str = "float32,bfloat16",
    layout: str = "contiguous,channels_last",
    contenders: str = "all",
    batch: PositiveInt = 64,
    channels: PositiveInt = 2048,
    height: PositiveInt = 7,
    width: PositiveInt = 7,
    reduction: PositiveInt = 12,
    classes: PositiveInt = 751,
    repeat: PositiveInt = 15,
    threads: NonNegativeInt = 0,
    compile_budget_s: PositiveFloat = 300.0,
    check: bool = False,
    console: Console | None = None,
) -> bool:
    """Time the ways to run the attention head side by side, after checking that they agree.

    Args:
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        json: Also write everything into this file, anew after every table.
        dtype: Types of the map, with commas between: float32, bfloat16, float16, float64.
        layout: Memory layouts of the map, with commas between: contiguous, channels_last.
        contenders: Some of reference, eager, compiled and kernels, with commas between; or all.
        batch: Images (the paper: 64).
        channels: Channels of the map (ResNet-50: 2048).
        height: Rows of the map (images of 224 pixels: 7).
        width: Columns of the map.
        reduction: Dimension reduction ratio r of NL-CBAM (the paper: 12).
        classes: Persons of the classifier, whose rows the class activation map reads (Market-1501: 751).
        repeat: Repetitions of each pass of each contender.
        threads: CPU threads; 0 leaves PyTorch's own number.
        compile_budget_s: Seconds that torch.compile may take for one type and layout.
        check: Fail if a bar is missed or was not measured.
        console: Where the tables go.

    Returns:
        Whether every bar is met.

    Raises:
        DanFastError: a setting does not fit, the file cannot be written, or with `check` a bar is missed.
    """
    dtypes, layouts = dtypes_of(dtype), one_of("layout", layout, tuple(LAYOUTS))
    chosen = list(CONTENDERS) if contenders == "all" else one_of("contenders", contenders, CONTENDERS)
    size = MapSize(*map(int, (batch, channels, height, width, reduction, classes)))
    plan = HeadPlan(chosen, resolve_device(device), size, int(repeat), float(compile_budget_s))
    with cpu_threads(int(threads)):
        return _measure(plan, dtypes, layouts, json, check, output_console(console))


def _measure(
    plan: HeadPlan, dtypes: list[torch.dtype], layouts: list[str], json: str | None, check: bool, console: Console
) -> bool:
    found = environment(plan.device)
    rows: list[HeadRow] = []

    def write(complete: bool) -> None:
        if json is not None:
            content = _report(plan, dtypes, layouts, found, rows, complete)
            write_text(Path(json), json_text.dumps(content, indent=2) + "\n")

    # Now rather than after minutes of measuring: the folder may not be writable.
    write(complete=False)
    for dtype in dtypes:
        for layout in layouts:
            with console.status("") as status:
                measured = HeadGroup(plan, dtype, layout, status.update).measure()
            rows += measured
            _print_rows(console, measured)
            write(complete=False)
    write(complete=True)
    console.print(
        "ms: median (quartiles, repetitions). Ratios: forward / forward + backward. of copy: the bytes of reading X "
        "forward, reading X and writing dX backward at the measured copy bandwidth over the time.",
        highlight=False,
    )
    console.print(f"extra MB: {PEAK_MEANING[plan.device.type]}; less results and gradients.", highlight=False)
    bars = head_bars(rows, layouts, plan.device.type)
    print_bars(console, "Bars: float32" if plan.device.type == "cpu" else "Bars", bars)
    print_environment(console, found)
    return all_met(bars, check)


def _report(
    plan: HeadPlan,
    dtypes: list[torch.dtype],
    layouts: list[str],
    found: dict[str, Any],
    rows: list[HeadRow],
    complete: bool,
) -> dict[str, Any]:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
    bars = head_bars(rows, layouts, plan.device.type)
    return {
        "schema": SCHEMA,
        "benchmark": "attention",
        "complete": complete,
        "environment": found,
        "settings": {
            "device": str(plan.device),
            "size": plan.size._asdict(),
            "dtype": list(names),
            "layout": layouts,
            "contenders": list(plan.contenders),
            "repeat": plan.repeat,
            "compile_budget_s": plan.compile_budget_s,
        },
        "meaning": MEANING | {"peak_bytes": PEAK_MEANING[plan.device.type]},
        "tolerances": {name: TOLERANCES[dtype] for name, dtype in names.items()},
        "rows": [row.to_dict() for row in rows],
        "bars": [bar._asdict() | {"verdict": bar.verdict} for bar in bars],
    }


def _print_rows(console: Console, rows: Sequence[HeadRow]) -> None:
    first = rows[0]
    shape = " x ".join(map(str, first.size[:4]))
    table = Table(title=f"{first.dtype}, {first.layout}: {shape}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    rivals = [row.contender for row in rows if row.contender != KERNELS]
    for name in ("forward ms", "fwd + bwd ms", "extra MB", "model MB", "of copy", *(f"vs {rival}" for rival in rivals)):
        table.add_column(name, justify="right")
    for row in rows:
        shares = [row.bandwidth_share(kind) for kind in (FORWARD, BACKWARD)]
        table.add_row(
            row.contender,
            milliseconds(row.seconds.get(FORWARD)),
            milliseconds(row.seconds.get(BACKWARD)),
            "-" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.1f}",
            " / ".join(f"{head_bytes(row.size, row.itemsize, kind) / 1e6:.3g}" for kind in (FORWARD, BACKWARD)),
            "-" if None in shares else " / ".join(f"{share:.1%}" for share in shares),
            *(_speedup(row, rival) for rival in rivals),
        )
    console.print(table)
    bandwidth = next((row.bandwidth for row in rows if row.bandwidth), None)
    if bandwidth:
        console.print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, read and written")
    for row in rows:
        for remark in _remarks(row):
            console.print(f"{row.contender}: {escape(remark)}", highlight=False)


def _speedup(row: HeadRow, rival: str) -> str:
    ratios = row.speedup.get(rival)
    return "-" if ratios is None else " / ".join(f"{ratios[kind]:.3g}" for kind in (FORWARD, BACKWARD))


def _remarks(row: HeadRow) -> list[str]:
    if row.left_out:
        return [f"left out: {row.left_out}"]
    remarks = [f"agrees with the reference, largest difference {max(row.errors.values()):.1e}"]
    if row.disagrees:
        remarks = [f"disagrees with the reference: {row.disagrees}; no ratio is given"]
    if row.operators:
        remarks.append(f"operators {', '.join(row.operators)}")
    if row.compile_seconds is not None:
        remarks.append(f"compiled in {row.compile_seconds:.1f} s, not counted")
    return remarks + row.notes
