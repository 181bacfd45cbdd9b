"""Whole training iterations side by side, Table VIII: agreement first, then times taken in turn."""

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dan_fast.bench.contenders import select
from dan_fast.bench.iteration_agreement import TOLERANCES, compare_iteration
from dan_fast.bench.iteration_contenders import (
    FROZEN,
    UPDATED,
    DANIteration,
    IterationSize,
    PlainIteration,
    literal_operators,
)
from dan_fast.bench.iteration_profile import Profile
from dan_fast.bench.machine import free_memory, peak_above
from dan_fast.bench.memory import foresee
from dan_fast.bench.problem import Size
from dan_fast.bench.timing import Operators, Timing, once, repetitions, rounds
from dan_fast.bench.verdict import Bar, at_most

PLAIN, LITERAL, DAN = "plain", "literal", "dan"
CONTENDERS = (PLAIN, LITERAL, DAN)
# Table VIII: 137.908 s an epoch against ResNet-50's 32.609 s.
PAPER_RATIO = 137.908 / 32.609
EPOCH_IMAGES = 12_936
_CPU_RATIO, _GPU_RATIO = 1.20, 1.15
# The literal operators and the package's are compared on so many images and slots.
_CHECK = {"images": 8, "labeled_slots": 120, "unlabeled_slots": 80}

Say = Callable[[str], None]


@dataclass(frozen=True)
class IterationPlan:
    """What to measure.

    Attributes:
        contenders: of CONTENDERS.
        orders: of the meta gradients, 1 and 2.
        device: as in `TrainConfig`.
        precision: as in `TrainConfig`.
        size: of everything.
        repeat: repetitions of each contender, fewer where `budget_s` is spent before.
        budget_s: seconds a contender may take in all its repetitions; a literal one that would need more for one run
            is left out.
    """

    contenders: Sequence[str] = CONTENDERS
    orders: Sequence[int] = (1, 2)
    device: str = "cpu"
    precision: str = "float32"
    size: IterationSize = IterationSize()
    repeat: int = 5
    budget_s: float = 300.0


@dataclass
class IterationRow:
    """A kind of iteration.

    Attributes:
        contender: PLAIN, LITERAL or DAN.
        order: of the meta gradients, None for PLAIN.
        backbone: UPDATED, or FROZEN where the adversary won.
        images: of an iteration.
        seconds: of an iteration.
        left_out: why the row has no times, None if it has.
        disagrees: where the package's gradients and the literal operators' differ, None if nowhere or not compared.
            Such a row has no ratio.
        errors: that difference by group of parameters.
        rounding: what rounding alone does to the literal operators' gradients.
        allowed: the largest error that is no disagreement.
        operators: the operators of dan_fast that ran.
        gflop: 1e9 operations of an iteration.
        peak_bytes: how far memory rose above where it stood.
        profile: part -> seconds, of one iteration that is in no other figure.
        ratio: median over PLAIN's.
        round_ratios: the same, round by round.
    """

    contender: str
    order: int | None
    backbone: str
    images: int
    seconds: Timing = field(default_factory=Timing)
    left_out: str | None = None
    disagrees: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)
    operators: list[str] = field(default_factory=list)
    gflop: float | None = None
    peak_bytes: int | None = None
    profile: dict[str, float] = field(default_factory=dict)
    ratio: float | None = None
    round_ratios: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.contender if self.order is None else f"{self.contender}, order {self.order}, {self.backbone}"

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.seconds.median if self.seconds.seconds else None

    @property
    def epoch_seconds(self) -> float | None:
        return EPOCH_IMAGES / self.images_per_second if self.seconds.seconds else None

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        measured = bool(self.seconds.seconds)
        content["seconds"] = self.seconds.to_dict() if measured else None
        content["images_per_second"], content["epoch_seconds"] = self.images_per_second, self.epoch_seconds
        content["gflop_per_second"] = self.gflop / self.seconds.median if measured and self.gflop else None
        return content


class IterationGroup:
    """All kinds of iterations with one trainer, on one mini-batch.

    Args:
        plan: what to measure.
        say: told what is going on.
    """

    def __init__(self, plan: IterationPlan, say: Say = lambda _: None) -> None:
        self.plan, self.say = plan, say
        images = plan.size.images
        self.rows: list[IterationRow] = []
        if PLAIN in plan.contenders:
            self.rows.append(IterationRow(PLAIN, None, UPDATED, images))
        if LITERAL in plan.contenders:
            self.rows.append(IterationRow(LITERAL, 1, UPDATED, images))
        if DAN in plan.contenders:
            kinds = [(order, backbone) for order in plan.orders for backbone in (UPDATED, FROZEN)]
            self.rows += [IterationRow(DAN, order, backbone, images) for order, backbone in kinds]
        self.runs: dict[int, Callable[[], None]] = {}
        self.first: dict[int, float] = {}

    def measure(self) -> list[IterationRow]:
        """The finished rows; a contender that cannot run leaves the reason in its row."""
        # Checked before they are timed; the files of the trainers are of no use afterwards.
        with tempfile.TemporaryDirectory(prefix="dan_fast_bench_") as folder:
            self._agree(Path(folder) / "check")
            self.say("making the networks and memories")
            plan = self.plan
            dan = DANIteration(plan.size, plan.device, plan.precision, Path(folder) / "run")
            plain = PlainIteration(plan.size, dan) if PLAIN in plan.contenders else None
            for index, row in enumerate(self.rows):
                self.say(f"first runs: {row.name}")
                self._first_runs(index, row, dan, plain)
            self._time()
            dan.scalars.close()
        set_ratios(self.rows)
        return self.rows

    def _agree(self, folder: Path) -> None:
        """The gradients that an iteration would follow, with the package's operators and with the literal ones."""
        compared = [row for row in self.rows if row.contender == DAN]
        if not compared:
            return
        plan = self.plan
        few = {name: min(value, getattr(plan.size, name)) for name, value in _CHECK.items()}
        dan = DANIteration(plan.size._replace(**few), plan.device, plan.precision, folder)
        for row in compared:
            self.say(f"comparing with the literal operators: {row.name}")
            dan.set(row.order, row.backbone)
            row.disagrees, row.errors, row.rounding, row.allowed = compare_iteration(dan, TOLERANCES[plan.precision])
        dan.scalars.close()

    def _first_runs(self, index: int, row: IterationRow, dan: DANIteration, plain: PlainIteration | None) -> None:
        """The operations of an iteration, its memory, where its time goes, and a first time."""
        operators, context = dan.trainer, nullcontext
        if row.contender == LITERAL:
            row.left_out = self._too_costly(dan)
            if row.left_out:
                return

            def context():
                return literal_operators(operators)

        def run() -> None:
            if row.contender == PLAIN:
                plain.run()
                return
            dan.set(row.order, row.backbone)
            with context():
                dan.run()

        try:
            with FlopCounterMode(display=False) as counter, Operators() as found:
                run()
            row.operators, row.gflop = sorted(found.names), counter.get_total_flops() / 1e9
            start = time.perf_counter()
            _, row.peak_bytes = peak_above(dan.trainer.device, run)
            self.first[index] = time.perf_counter() - start
            if row.contender == DAN:
                profile = Profile(dan.trainer)
                with profile.recording():
                    run()
                row.profile = dict(profile.seconds)
        except (MemoryError, torch.OutOfMemoryError):
            row.left_out = "out of memory"
            self.first.pop(index, None)
            return
        self.runs[index] = run

    def _too_costly(self, dan: DANIteration) -> str | None:
        """Why a literal iteration is left out: its two memory steps are foreseen from steps with few slots."""
        size, trainer = self.plan.size, dan.trainer
        few = max(1, size.images // 4)
        slots = Size(size.labeled_slots, size.unlabeled_slots, trainer.model.network.key_dim, few)
        (step,) = select(["literal_autograd"])
        seconds, needed = (2 * x for x in foresee(step, slots, torch.float32, trainer.device))
        if seconds > self.plan.budget_s:
            return f"its memory steps alone would take about {seconds:.0f} s, the budget is {self.plan.budget_s:.0f} s"
        free = free_memory(trainer.device)
        if free is not None and needed > free:
            return f"its memory steps would need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return None

    def _time(self) -> None:
        device = torch.device(self.plan.device)
        turns = repetitions(self.first, self.plan.repeat, self.plan.budget_s)
        for number, turn in enumerate(rounds(turns)):
            gc.collect()
            for index in turn:
                self.say(f"round {number + 1}: {self.rows[index].name}")
                self.rows[index].seconds.seconds.append(once(device, self.runs[index]))


def set_ratios(rows: Sequence[IterationRow]) -> None:
    """Each row's median over plain ResNet's; none for a row that disagrees."""
    plain = next((row.seconds for row in rows if row.contender == PLAIN and row.seconds.seconds), None)
    for row in rows:
        row.ratio, row.round_ratios = None, []
        if plain and row.contender != PLAIN and row.seconds.seconds and not row.disagrees:
            row.ratio = row.seconds.median / plain.median
            row.round_ratios = [a / b for a, b in zip(row.seconds.seconds, plain.seconds, strict=False)]


def iteration_bars(rows: Sequence[IterationRow], plan: IterationPlan) -> list[Bar]:
    """DAN of order 1 that updates the backbone, against plain ResNet."""
    row = next((r for r in rows if (r.contender, r.order, r.backbone) == (DAN, 1, UPDATED)), None)
    name = f"order 1, backbone updated, over plain {plan.size.backbone} ({plan.precision}, {plan.size.images} images)"
    value = row.ratio if row else None
    if torch.device(plan.device).type == "cpu":
        return [at_most(name, f"at most {_CPU_RATIO:.2f} times", _CPU_RATIO, value)]
    value = value if plan.precision == "bfloat16" else None
    return [at_most(name, f"at most {_GPU_RATIO:.2f} times in bfloat16", _GPU_RATIO, value)]
