"""`dan-fast bench ranking`: from settings to figures."""

import json as json_text
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.table import Table

from dan_fast.bench.machine import PEAK_MEANING, environment
from dan_fast.bench.ranking import (
    DISTANCES,
    FEATURES,
    MARKET1501,
    MSMT17,
    PRODUCT,
    SORTING,
    TOLERANCE,
    RankingMeasurement,
    RankingPlan,
    RankingSize,
    measure_ranking,
    ranking_bars,
    speedup,
)
from dan_fast.bench.settings import cpu_threads, milliseconds, output_console, print_environment
from dan_fast.bench.verdict import all_met, print_bars
from dan_fast.core.files import write_text
from dan_fast.training.build import resolve_device

SCHEMA = 1
MEANING = {
    "seconds": "of one evaluation: CMC, mAP and mINP; repetitions of the contenders in turn, after one of each",
    "given distances": "float32, 1 - cos",
    "features": "float32; the matrix product is PyTorch's, in float32, and ranks nothing; sorting forms float64",
    "agreement": f"with sorting: CMC in every bit, mAP and mINP within {TOLERANCE:g}",
    "speedup": "median of the other / median of dan_fast; none without agreement",
}


def bench_ranking(
    device: str = "auto",
    json: str | None = None,
    queries: PositiveInt = MARKET1501.queries,
    gallery: PositiveInt = MARKET1501.gallery,
    width: PositiveInt = MARKET1501.width,
    ids: PositiveInt = MARKET1501.ids,
    cams: PositiveInt = MARKET1501.cams,
    memory_queries: PositiveInt = MSMT17.queries,
    memory_gallery: PositiveInt = MSMT17.gallery,
    memory_width: PositiveInt = MSMT17.width,
    repeat: PositiveInt = 7,
    budget_s: PositiveFloat = 60.0,
    threads: NonNegativeInt = 0,
    check: bool = False,
    console: Console | None = None,
) -> bool:
    """Time the evaluation of a ranking beside one that sorts, after checking that both give the same figures.

    Args:
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        json: Also write everything into this file.
        queries: Images that are searched for (Market-1501: 3368).
        gallery: Images that are searched in (Market-1501: 15913).
        width: Numbers of a feature (ResNet-50: 2048).
        ids: Persons, the distractors' common identity among them.
        cams: Cameras, two at least.
        memory_queries: Queries of the run whose memory is measured (MSMT17: 11659).
        memory_gallery: Gallery images of that run (MSMT17: 82161).
        memory_width: Numbers of a feature in that run; features are not counted.
        repeat: Repetitions of each contender.
        budget_s: Seconds that a contender may take in all its repetitions, one at least.
        threads: CPU threads; 0 leaves PyTorch's own number.
        check: Fail if a bar is missed or was not measured.
        console: Where the tables go.

    Returns:
        Whether every bar is met.

    Raises:
        DanFastError: a setting does not fit, the file cannot be written, or with `check` a bar is missed.
    """
    size = RankingSize(*map(int, (queries, gallery, width, max(2, ids), max(2, cams))))
    memory_size = MSMT17._replace(queries=int(memory_queries), gallery=int(memory_gallery), width=int(memory_width))
    plan = RankingPlan(size, memory_size, resolve_device(device), int(repeat), float(budget_s))
    console = output_console(console)
    with cpu_threads(int(threads)):
        found = environment(plan.device)
        if json is not None:
            # Now rather than after minutes of measuring: the folder may not be writable.
            write_text(Path(json), json_text.dumps({"benchmark": "ranking", "complete": False}) + "\n")
        with console.status("") as status:
            measured = measure_ranking(plan, status.update)
    bars = ranking_bars(plan, measured)
    if json is not None:
        write_text(Path(json), json_text.dumps(_report(plan, found, measured), indent=2) + "\n")
    _print(console, plan, measured)
    print_bars(console, "Bars", bars)
    print_environment(console, found)
    return all_met(bars, check)


def _report(plan: RankingPlan, found: dict[str, Any], measured: RankingMeasurement) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "benchmark": "ranking",
        "complete": True,
        "environment": found,
        "settings": {
            "device": str(plan.device),
            "size": plan.size._asdict(),
            "memory_size": plan.memory_size._asdict(),
            "repeat": plan.repeat,
            "budget_s": plan.budget_s,
        },
        "meaning": MEANING | {"extra_bytes": PEAK_MEANING[plan.device.type]},
        "rows": [row.to_dict() for row in measured.rows],
        "speedup": {
            source: {rival: speedup(measured.rows, source, rival) for rival in rivals}
            for source, rivals in ((DISTANCES, (SORTING,)), (FEATURES, (PRODUCT, SORTING)))
        },
        "extra_bytes": measured.extra_bytes,
        "memory_seconds": measured.memory_seconds,
        "bars": [bar._asdict() | {"verdict": bar.verdict} for bar in ranking_bars(plan, measured)],
    }


def _print(console: Console, plan: RankingPlan, measured: RankingMeasurement) -> None:
    size = plan.size
    table = Table(
        title=f"{size.queries} queries x {size.gallery} gallery images, {size.width} wide", title_justify="left"
    )
    for name in ("from", "contender", "path"):
        table.add_column(name)
    for name in ("ms", "times dan_fast"):
        table.add_column(name, justify="right")
    for row in measured.rows:
        ratio = speedup(measured.rows, row.source, row.contender)
        table.add_row(
            row.source, row.contender, row.path, milliseconds(row.seconds), "-" if ratio is None else f"{ratio:.3g}"
        )
    console.print(table)
    for row in measured.rows:
        if row.path:
            agrees = f"disagrees with sorting: {row.disagrees}; no ratio is given" if row.disagrees else "agrees"
            console.print(f"{row.source}: {agrees} (CMC in every bit, mAP and mINP within {TOLERANCE:g})")
    extra = "-" if measured.extra_bytes is None else f"{measured.extra_bytes / 1e6:.1f} MB"
    shape = " x ".join(map(str, plan.memory_size[:2]))
    console.print(
        f"memory at {shape}, {plan.memory_size.width} wide: {extra} beyond the features, in "
        f"{measured.memory_seconds:.1f} s ({PEAK_MEANING[plan.device.type]})",
        highlight=False,
    )
    console.print("ms: median (quartiles, repetitions), contenders in turn.", highlight=False)
