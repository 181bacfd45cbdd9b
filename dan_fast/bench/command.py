"""`dan-fast bench`: from settings to figures."""

from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console

from dan_fast.bench.bars import check_bars, predict
from dan_fast.bench.contenders import select
from dan_fast.bench.machine import environment
from dan_fast.bench.memory import Group, Plan
from dan_fast.bench.problem import BATCH, KEY_DIM, LABELED_SLOTS, UNLABELED_SLOTS, Size
from dan_fast.bench.report import Report, print_rows, print_summary
from dan_fast.bench.results import Row
from dan_fast.bench.settings import cpu_threads, dtypes_of, output_console
from dan_fast.bench.verdict import all_met
from dan_fast.core.errors import DanFastError
from dan_fast.training.build import resolve_device
from dan_fast.triton_kernels import Products, float32_products, products_now


def bench_memory(
    device: str = "auto",
    json: str | None = None,
    slots_scale: str = "1,0.25,4,16",
    dtype: str = "float32,bfloat16",
    contenders: str = "all",
    threads: NonNegativeInt = 0,
    repeat: PositiveInt = 7,
    steps: PositiveInt = 8,
    budget_s: PositiveFloat = 90.0,
    compile_budget_s: NonNegativeFloat = 300.0,
    labeled_slots: PositiveInt = LABELED_SLOTS,
    unlabeled_slots: PositiveInt = UNLABELED_SLOTS,
    key_dim: PositiveInt = KEY_DIM,
    batch: PositiveInt = BATCH,
    products: Products = "float32",
    check: bool = False,
    console: Console | None = None,
) -> bool:
    """Time the ways to make a memory step side by side, after checking that they agree.

    Args:
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        json: Also write everything into this file, anew after every table.
        slots_scale: Sizes as multiples of the slots, with commas between.
        dtype: Types of keys and memories, with commas between: float32, bfloat16, float16, float64.
        contenders: Some of literal_autograd, literal_in_place, score_space, score_space_compiled and kernels, with
            commas between; or all.
        threads: CPU threads; 0 leaves PyTorch's own number.
        repeat: Repetitions of each pass of each contender.
        steps: Steps of a module in a repetition, before what it left pending is written.
        budget_s: Seconds that a pass of a contender may take in all its repetitions; one that would take longer for
            a single one is left out.
        compile_budget_s: Seconds that torch.compile may take at one size and type; after a failure it is not tried
            again. What was compiled is kept by PyTorch's cache for the next run.
        labeled_slots: Slots of M at scale 1 (the paper: 9000).
        unlabeled_slots: Slots of M' at scale 1 (the paper: 5500).
        key_dim: Numbers of a key (the paper: 2045).
        batch: Labelled samples a step, and as many unlabelled ones (the paper: 32).
        products: How the kernels multiply float32 on a GPU, as memory.products of a training: float32 or tf32x3.
        check: Fail if a bar is missed or was not measured.
        console: Where the tables go.

    Returns:
        Whether every bar is met.

    Raises:
        DanFastError: a setting does not fit, the file cannot be written, or with `check` a bar is missed.
    """
    scales = [_scale(part) for part in slots_scale.split(",")]
    dtypes = dtypes_of(dtype)
    try:
        chosen = select(None if contenders == "all" else [name.strip() for name in contenders.split(",")])
    except ValueError as error:
        raise DanFastError(f"contenders: {error}.") from error
    size = Size(int(labeled_slots), int(unlabeled_slots), int(key_dim), int(batch))
    plan = Plan(chosen, resolve_device(device), size, int(repeat), int(steps), float(budget_s), float(compile_budget_s))
    with cpu_threads(int(threads)), float32_products(products):
        return _measure(plan, scales, dtypes, json, check, output_console(console))


def _measure(
    plan: Plan, scales: list[float], dtypes: list[torch.dtype], json: str | None, check: bool, console: Console
) -> bool:
    settings: dict[str, Any] = {
        "device": str(plan.device),
        "size": plan.size._asdict(),
        "slots_scale": scales,
        "dtype": [str(dtype).removeprefix("torch.") for dtype in dtypes],
        "contenders": list(dict.fromkeys(contender.name for contender in plan.contenders)),
        "repeat": plan.repeat,
        "steps": plan.steps,
        "products": products_now(),
        "budget_s": plan.budget_s,
        "compile_budget_s": plan.compile_budget_s,
    }
    found, prediction = environment(plan.device), predict(plan.size, scales)
    rows: list[Row] = []
    report = Report(found, settings, rows, check_bars(rows, plan.device.type), prediction, complete=False)
    if json is not None:
        # Now rather than after an hour of measuring: the folder may not be writable.
        report.write(json)
    for dtype in dtypes:
        for scale in scales:
            with console.status("") as status:
                group = Group(plan, scale, dtype, status.update)
                measured = group.measure()
            rows += measured
            print_rows(console, measured)
            report = report._replace(bars=check_bars(rows, plan.device.type))
            if json is not None:
                report.write(json)
    report = report._replace(complete=True)
    if json is not None:
        report.write(json)
    print_summary(console, report, plan.device.type)
    return all_met(report.bars, check)


def _scale(part: str) -> float:
    try:
        scale = float(part)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise DanFastError(f"slots_scale: {part.strip()!r} is no positive number: write them as 0.25,1,4,16.")
    return scale
