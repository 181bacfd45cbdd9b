"""`dan-fast bench iteration`: from settings to figures."""

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dan_fast.bench.iteration import (
    CONTENDERS,
    EPOCH_IMAGES,
    PAPER_RATIO,
    IterationGroup,
    IterationPlan,
    IterationRow,
    iteration_bars,
)
from dan_fast.bench.iteration_agreement import TOLERANCES
from dan_fast.bench.iteration_contenders import IterationSize
from dan_fast.bench.iteration_profile import PROFILE_MEANING
from dan_fast.bench.machine import PEAK_MEANING, environment
from dan_fast.bench.settings import cpu_threads, milliseconds, one_of, output_console, print_environment
from dan_fast.bench.timing import Timing
from dan_fast.bench.verdict import all_met, print_bars
from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_text
from dan_fast.training.build import resolve_device
from dan_fast.training.config import Precision

SCHEMA = 1
# S and S~ each need a labelled and an unlabelled image, and batch norm two of a map of one position.
_FEWEST_IMAGES = 8
MEANING = {
    "plain": "the backbone with a linear classifier: forward, cross-entropy, backward and SGD step on the same images",
    "literal": "DAN in the same trainer with reference.memory_step and reference.attention_head, order 1",
    "dan": "DAN with this package, Trainer's own iteration from the batch on the host to the optimizer's step",
    "updated": "the attention branch wins: backbone, classifier and gates are updated",
    "frozen": "the adversary branch wins: NL-CBAM, CAM weight and gates are updated",
    "seconds": "an iteration; images are drawn, not decoded; repetitions of the contenders in turn",
    "epoch_seconds": f"for {EPOCH_IMAGES} images, those of Market-1501's training set",
    "gflop": (
        "1e9 operations of an iteration by torch.utils.flop_counter, products and convolutions only; those inside the "
        "package's compiled operators are not counted"
    ),
    "errors": (
        "distance of the gradients an iteration would follow from those with the literal operators, as a share of "
        "their norm, on few images and slots in the same run, with S~ at the same weights"
    ),
    "rounding": "the same between literal gradients with and without the last bit of the last feature map changed",
    "allowed": "the largest error that is no disagreement: tolerance, or 4 times rounding where that is more",
    "ratio": "median over the median of plain; round_ratios: round by round; none without agreement",
    "paper_ratio": "Table VIII: 137.908 s an epoch against 32.609 s",
    "profile": PROFILE_MEANING,
}


def bench_iteration(
    device: str = "auto",
    json: str | None = None,
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50",
    height: PositiveInt = 224,
    width: PositiveInt = 224,
    images: PositiveInt = 64,
    order: str = "1,2",
    contenders: str = "all",
    precision: Precision = "float32",
    labeled_slots: PositiveInt = 9000,
    unlabeled_slots: PositiveInt = 5500,
    classes: PositiveInt = 751,
    repeat: PositiveInt = 5,
    threads: NonNegativeInt = 0,
    budget_s: PositiveFloat = 300.0,
    check: bool = False,
    console: Console | None = None,
) -> bool:
    """Time whole training iterations beside plain ResNet's, Table VIII, after checking the gradients.

    Args:
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        json: Also write everything into this file.
        backbone: torchvision ResNet (the paper: resnet50).
        height: Rows of an image in pixels (the paper: 224).
        width: Columns of an image in pixels (the paper: 224).
        images: Images of an iteration, S and S~ together (the paper: 64).
        order: Orders of the meta gradients, with commas between: 1, 2.
        contenders: Some of plain, literal and dan, with commas between; or all.
        precision: float32, or bfloat16 autocast for the network.
        labeled_slots: Slots of M, all of them filled (the paper: 9000).
        unlabeled_slots: Slots of M', all of them filled (the paper: 5500).
        classes: Persons of the classifier (Market-1501: 751).
        repeat: Repetitions of each contender.
        threads: CPU threads; 0 leaves PyTorch's own number.
        budget_s: Seconds that a contender may take in all its repetitions; a literal iteration that would take longer
            for a single one is left out.
        check: Fail if the bar is missed or was not measured.
        console: Where the tables go.

    Returns:
        Whether the bar is met.

    Raises:
        DanFastError: a setting does not fit, the file cannot be written, or with `check` the bar is missed.
    """
    orders = [int(word) for word in one_of("order", order, ("1", "2"))]
    chosen = list(CONTENDERS) if contenders == "all" else one_of("contenders", contenders, CONTENDERS)
    if images < _FEWEST_IMAGES:
        raise DanFastError(f"images: {images} are too few: S and S~ need {_FEWEST_IMAGES} together, or more.")
    if classes < 2:
        raise DanFastError(f"classes: {classes} is too few: a classifier needs 2 persons or more.")
    size = IterationSize(backbone, *map(int, (height, width, images, labeled_slots, unlabeled_slots, classes)))
    place = str(resolve_device(device))
    plan = IterationPlan(chosen, orders, place, precision, size, int(repeat), float(budget_s))
    with cpu_threads(int(threads)):
        return _measure(plan, json, check, output_console(console))


def _measure(plan: IterationPlan, json: str | None, check: bool, console: Console) -> bool:
    found = environment(resolve_device(plan.device))

    def write(rows: Sequence[IterationRow], complete: bool) -> None:
        if json is not None:
            write_text(Path(json), json_text.dumps(_report(plan, found, rows, complete), indent=2) + "\n")

    # Now rather than after minutes of measuring: the folder may not be writable.
    write([], complete=False)
    with console.status("") as status:
        rows = IterationGroup(plan, status.update).measure()
    write(rows, complete=True)
    _print_rows(console, plan, rows)
    _print_profiles(console, rows)
    bars = iteration_bars(rows, plan)
    print_bars(console, "Bar", bars)
    print_environment(console, found)
    return all_met(bars, check)


def _report(plan: IterationPlan, found: dict[str, Any], rows: Sequence[IterationRow], complete: bool) -> dict[str, Any]:
    kind = resolve_device(plan.device).type
    return {
        "schema": SCHEMA,
        "benchmark": "iteration",
        "complete": complete,
        "environment": found,
        "settings": {
            "device": plan.device,
            "size": plan.size._asdict(),
            "order": list(plan.orders),
            "contenders": list(plan.contenders),
            "precision": plan.precision,
            "repeat": plan.repeat,
            "budget_s": plan.budget_s,
        },
        "meaning": MEANING | {"peak_bytes": PEAK_MEANING[kind]},
        "tolerance": TOLERANCES[plan.precision],
        "paper_ratio": PAPER_RATIO,
        "rows": [row.to_dict() for row in rows],
        "bars": [bar._asdict() | {"verdict": bar.verdict} for bar in iteration_bars(rows, plan)],
    }


def _print_rows(console: Console, plan: IterationPlan, rows: Sequence[IterationRow]) -> None:
    size = plan.size
    title = (
        f"{size.backbone}, {size.images} images of {size.height} x {size.width}, {plan.precision}, "
        f"{size.labeled_slots} and {size.unlabeled_slots} slots: one training iteration"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in ("ms", "images/s", "s/epoch", "GFLOP", "GFLOP/s", "peak MB", "over plain", "by round"):
        table.add_column(name, justify="right")
    for row in rows:
        content = row.to_dict()
        table.add_row(
            row.name,
            milliseconds(row.seconds if row.seconds.seconds else None),
            *(
                "-" if value is None else f"{value / scale:.{digits}f}"
                for value, scale, digits in (
                    (row.images_per_second, 1, 1),
                    (row.epoch_seconds, 1, 1),
                    (row.gflop, 1, 1),
                    (content["gflop_per_second"], 1, 1),
                    (row.peak_bytes, 1e6, 0),
                    (row.ratio, 1, 3),
                )
            ),
            _spread(row.round_ratios),
        )
    console.print(table)
    console.print(
        f"ms: median (quartiles, repetitions). s/epoch: for {EPOCH_IMAGES} images. The paper's DAN takes "
        f"{PAPER_RATIO:.2f} times as long as its ResNet-50 (Table VIII).",
        highlight=False,
    )
    for row in rows:
        for remark in _remarks(row):
            console.print(f"{row.name}: {escape(remark)}", highlight=False)


def _spread(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    lower, upper = Timing(ratios).quartiles
    return f"{lower:.3f}..{upper:.3f}"


def _remarks(row: IterationRow) -> list[str]:
    if row.left_out:
        return [f"left out: {row.left_out}"]
    if row.disagrees:
        return [f"disagrees with the literal operators: {row.disagrees}; no ratio is given"]
    if row.errors:
        group = max(row.errors, key=lambda group: row.errors[group])
        return [
            f"agrees with the literal operators, largest difference {row.errors[group]:.1e} in {group}, "
            f"what rounding alone does {row.rounding[group]:.1e}, allowed {row.allowed[group]:.1e}"
        ]
    return []


def _print_profiles(console: Console, rows: Sequence[IterationRow]) -> None:
    profiled = [row for row in rows if row.profile]
    if not profiled:
        return
    table = Table(title="Where the time of one iteration goes, ms", title_justify="left")
    table.add_column("part", no_wrap=True)
    for row in profiled:
        table.add_column(f"order {row.order}, {row.backbone}", justify="right")
    for part in dict.fromkeys(part for row in profiled for part in sorted(row.profile, key=_in_order)):
        table.add_row(part, *(f"{row.profile[part] * 1e3:.1f}" if part in row.profile else "-" for row in profiled))
    table.add_row("sum", *(f"{sum(row.profile.values()) * 1e3:.1f}" for row in profiled))
    console.print(table)


def _in_order(part: str) -> tuple[bool, bool, bool]:
    """S before S~, forward before backward, what belongs to neither last."""
    return ":" not in part, "S~" in part, part.startswith("backward")
