"""The memory step's contenders side by side: agreement first, then times taken in turn."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch._dynamo.utils import counters

from dan_fast import _extension
from dan_fast.bench.agreement import compare
from dan_fast.bench.compiled import compile_seconds
from dan_fast.bench.contenders import KERNELS, Contender, Outcome, Runner
from dan_fast.bench.machine import CacheFlush, Copy, float32_rate, free_memory, peak_above, synchronize
from dan_fast.bench.problem import Problem, Size, make_problem
from dan_fast.bench.results import Row, set_speedups
from dan_fast.bench.timing import BACKWARD, FORWARD, Operators, Timing, once, repetitions, rounds
from dan_fast.triton_kernels import products_now

# The literal forms are tried at so many slots of M to foresee their time and memory, which are linear in the slots.
_PROBE_SLOTS = 140
_MARGIN = 1.2
# The copy that measures the bandwidth is of the memories' size, within these bounds.
_COPY_BYTES = (16 * 2**20, 512 * 2**20)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        contenders: in the order of the rows.
        device: where.
        size: the slots of scale 1.
        repeat: repetitions of each pass of each contender, fewer where `budget_s` is spent before.
        steps: steps of a module before what it left pending is written.
        budget_s: seconds a pass of a contender may take in all; one that would need more for one run is left out.
        compile_budget_s: seconds torch.compile may take at one size and dtype; it is not tried again after it failed.
        gave_up: why, by the name of the contender.
    """

    contenders: tuple[Contender, ...]
    device: torch.device
    size: Size = Size()
    repeat: int = 7
    steps: int = 8
    budget_s: float = 90.0
    compile_budget_s: float = 300.0
    gave_up: dict[str, str] = field(default_factory=dict)


def foresee(contender: Contender, size: Size, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds and bytes of one run of a literal contender, from a run with few slots; zeros where `size` has few."""
    ratio = size.labeled_slots / _PROBE_SLOTS
    if ratio <= 2:
        return 0.0, 0.0
    problem = make_problem(size.scaled(1 / ratio), dtype, device, batches=1)
    contender.start(problem, 1).outcome()
    runner = contender.start(problem, 1)
    start = time.perf_counter()
    _, peak = peak_above(device, runner.outcome)
    synchronize(device)
    return ratio * (time.perf_counter() - start), ratio * (peak or 0)


class _Entry:
    """A contender at work: its row, its runner, and how long one run of each pass took when first tried."""

    def __init__(self, contender: Contender, row: Row) -> None:
        self.contender, self.row = contender, row
        self.runner: Runner | None = None
        self.first: dict[str, float] = {}

    def leave_out(self, reason: str, *passes: str) -> None:
        for kind in passes or self.contender.passes:
            self.row.left_out[kind] = reason
            self.first.pop(kind, None)


class Group:
    """All contenders at one size and dtype, on one problem.

    Args:
        plan: what to measure.
        scale: slots as a multiple of the plan's.
        dtype: of keys and memories.
        say: told what is going on.
    """

    def __init__(self, plan: Plan, scale: float, dtype: torch.dtype, say: Say = lambda _: None) -> None:
        self.plan, self.scale, self.dtype, self.say = plan, scale, dtype, say
        self.size = plan.size.scaled(scale)
        self.problem: Problem | None = None
        self.bandwidth = Timing()
        name = str(dtype).removeprefix("torch.")
        self.entries = [
            _Entry(contender, Row(contender.name, contender.use, name, dtype.itemsize, scale, self.size))
            for contender in plan.contenders
        ]

    def measure(self) -> list[Row]:
        """The finished rows; a contender that fails leaves the reason in its row."""
        needed = 2 * self.size.slots * self.size.key_dim * self.dtype.itemsize
        reason = self._too_large(needed, "the memories")
        if reason:
            for entry in self.entries:
                entry.leave_out(reason)
            return [entry.row for entry in self.entries]
        estimates = {
            entry.contender.name: self._estimate(entry.contender) for entry in self.entries if entry.contender.literal
        }
        self.problem = make_problem(self.size, self.dtype, self.plan.device, batches=self.plan.steps)
        self._agree(estimates)
        self._time()
        rows = [entry.row for entry in self.entries]
        set_speedups(rows)
        return rows

    def _too_large(self, needed: float, what: str) -> str | None:
        free = free_memory(self.plan.device)
        if free is None or needed <= free:
            return None
        return f"{what} would need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"

    def _estimate(self, contender: Contender) -> tuple[float, float]:
        return foresee(contender, self.size, self.dtype, self.plan.device)

    def _agree(self, estimates: dict[str, tuple[float, float]]) -> None:
        """Every contender's first step, compared with the literal one, or with score space where that is left out."""
        expected: tuple[str, Outcome] | None = None
        for entry in self.entries:
            name = entry.contender.name
            self.say(f"{entry.row.dtype}, {self.scale:g} x slots: {name} ({entry.row.use})")
            seconds, needed = estimates.get(name, (0.0, 0.0))
            reason = self._too_large(_MARGIN * needed, "a run") if needed else None
            reason = reason or self.plan.gave_up.get(name)
            if name == KERNELS:
                device = self.plan.device
                reason = reason or _extension.why_not_on(device.type, device.index)
            if seconds > self.plan.budget_s:
                reason = f"a run would take about {seconds:.0f} s, the budget is {self.plan.budget_s:.0f} s"
            if reason:
                entry.leave_out(reason)
                continue
            outcome = self._first_runs(entry)
            if outcome is None:
                continue
            if expected is None and entry.contender.passes == (FORWARD, BACKWARD):
                expected = name, outcome
            elif expected is None:
                entry.row.notes.append("nothing to compare with")
            else:
                entry.row.compared_with = expected[0]
                entry.row.disagrees, entry.row.errors = compare(outcome, expected[1], self.dtype)

    def _first_runs(self, entry: _Entry) -> Outcome | None:
        """The step that is compared, the memory of a run, and a first time for each pass; None: it failed."""
        contender = entry.contender
        if contender.compiled:
            found = compile_seconds(contender, self.size, self.dtype, self.plan.device, self.plan.compile_budget_s)
            if isinstance(found, str):
                self.plan.gave_up[contender.name] = f"{found}, at {self.scale:g} x slots in {entry.row.dtype}"
                entry.leave_out(found)
                return None
            entry.row.compile_seconds = found
        try:
            return self._try_out(entry)
        except (MemoryError, torch.OutOfMemoryError):
            entry.leave_out("out of memory")
            entry.runner = None
            return None

    def _try_out(self, entry: _Entry) -> Outcome:
        contender, device, row = entry.contender, self.plan.device, entry.row
        entry.runner = runner = contender.start(self.problem, self.plan.steps)
        row.steps, row.returned_bytes = runner.steps, runner.returned_bytes
        if contender.literal:
            # So slow that the run to compare has to serve for memory and time as well.
            start = time.perf_counter()
            outcome, row.peak_bytes = peak_above(device, runner.outcome)
            entry.first = dict.fromkeys(contender.passes, time.perf_counter() - start)
            return outcome
        if contender.compiled:
            counters.clear()
            outcome = runner.outcome()
            breaks = sum(counters["graph_break"].values())
            row.notes.append(f"{breaks} graph breaks" if breaks else "one graph")
        else:
            with Operators() as operators:
                outcome = runner.outcome()
            row.operators = sorted(operators.names)
        runner.run(False)
        _, row.peak_bytes = peak_above(device, lambda: runner.run(True))
        for kind in contender.passes:
            seconds = entry.first[kind] = self._once(runner, kind, lambda: None)
            if seconds > self.plan.budget_s:
                entry.leave_out(f"a run takes {seconds:.0f} s, the budget is {self.plan.budget_s:.0f} s", kind)
        return outcome

    def _once(self, runner: Runner | Copy, kind: str, flush: Callable[[], None]) -> float:
        run = runner.run if isinstance(runner, Copy) else lambda: runner.run(kind == BACKWARD)
        return once(self.plan.device, run, flush)

    def _time(self) -> None:
        """Repetitions in turn, so that a noisy neighbour meets all of them; each round begins with another."""
        device, flush = self.plan.device, CacheFlush(self.plan.device)
        memories = self.size.slots * self.size.key_dim * self.dtype.itemsize
        copy = Copy(device, min(max(memories, _COPY_BYTES[0]), _COPY_BYTES[1]))
        copy.run()
        first = {(i, kind): taken for i, entry in enumerate(self.entries) for kind, taken in entry.first.items()}
        for number, turns in enumerate(rounds(repetitions(first, self.plan.repeat, self.plan.budget_s))):
            self.say(f"{self.entries[0].row.dtype}, {self.scale:g} x slots: round {number + 1}")
            gc.collect()
            self.bandwidth.seconds.append(self._once(copy, FORWARD, flush))
            for index, kind in turns:
                entry = self.entries[index]
                seconds = self._once(entry.runner, kind, flush) / entry.row.steps
                entry.row.seconds.setdefault(kind, Timing()).seconds.append(seconds)
        if not self.bandwidth.seconds:
            return
        for entry in self.entries:
            entry.row.bandwidth = copy.moved_bytes / self.bandwidth.median
            if self.dtype in (torch.float32, torch.float16) and products_now() == "float32":
                entry.row.float32_rate = float32_rate(device)
