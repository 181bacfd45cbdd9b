"""The attention head's contenders side by side: agreement first, then times taken in turn."""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dan_fast.bench.attention_contenders import (
    COMPILED,
    CONTENDERS,
    EAGER,
    KERNELS,
    HeadOutcome,
    HeadProblem,
    HeadRunner,
    MapSize,
    compare_heads,
    make_head_problem,
    reference_outcome,
    start,
)
from dan_fast.bench.compiled import trial
from dan_fast.bench.machine import CacheFlush, Copy, free_memory, peak_above
from dan_fast.bench.timing import BACKWARD, FORWARD, Operators, Timing, once, rounds
from dan_fast.bench.verdict import Bar, at_least, at_most

_EAGER_SPEEDUP, _COMPILED_SPEEDUP, _EXTRA_BYTES, _FLOOR_FACTOR = 8, 3, 5e6, 2
# The copy that measures the bandwidth is so many maps long, within these bounds: a cache must not hold it.
_COPY_MAPS, _COPY_BYTES = 8, (16 * 2**20, 512 * 2**20)
# More gradients than memory is kept for.
_HELD = 4
# The reference in float64 and what autograd keeps of it.
_REFERENCE_MAPS = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class HeadPlan:
    """What to measure.

    Attributes:
        contenders: of CONTENDERS.
        device: where.
        size: of the map.
        repeat: repetitions of each pass of each contender.
        compile_budget_s: seconds torch.compile may take for one type and layout.
    """

    contenders: Sequence[str] = CONTENDERS
    device: torch.device = torch.device("cpu")
    size: MapSize = MapSize()
    repeat: int = 15
    compile_budget_s: float = 300.0


@dataclass
class HeadRow:
    """A contender on maps of one type and layout.

    Attributes:
        seconds: "forward" and "forward_backward", as far as measured.
        left_out: why the row has no times, None if it has.
        disagrees: what differs from the reference in float64, None if nothing does. Such a row has no speed-up.
        errors: the difference of each result and gradient.
        operators: the operators of dan_fast that ran, none on a PyTorch path.
        compile_seconds: of the first calls, which are in no other figure.
        peak_bytes: how far memory rose above where it stood, forward + backward.
        returned_bytes: how much of that is results and gradients, dX among them.
        bandwidth: bytes/s of the copy.
        speedup: other contender -> pass -> how many times as long that one takes.
    """

    contender: str
    dtype: str
    layout: str
    size: MapSize
    itemsize: int
    seconds: dict[str, Timing] = field(default_factory=dict)
    left_out: str | None = None
    disagrees: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    returned_bytes: int = 0
    bandwidth: float | None = None
    speedup: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def extra_bytes(self) -> int | None:
        return None if self.peak_bytes is None else max(0, self.peak_bytes - self.returned_bytes)

    def bandwidth_share(self, kind: str) -> float | None:
        """Time that the model's bytes take at the copy bandwidth, as a share of the time measured."""
        if kind not in self.seconds or not self.bandwidth:
            return None
        return head_bytes(self.size, self.itemsize, kind) / self.bandwidth / self.seconds[kind].median

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["size"] = self.size._asdict()
        content["seconds"] = {kind: timing.to_dict() for kind, timing in self.seconds.items()}
        content["extra_bytes"] = self.extra_bytes
        content["model_bytes"] = {kind: head_bytes(self.size, self.itemsize, kind) for kind in (FORWARD, BACKWARD)}
        content["bandwidth_share"] = {kind: self.bandwidth_share(kind) for kind in self.seconds}
        return content


def head_bytes(size: MapSize, itemsize: int, kind: str) -> int:
    """The bytes the head cannot do without, a model: X read forward, and X read and dX written backward.

    Example:
        >>> head_bytes(MapSize(), 4, "forward_backward") / 1e6
        77.070336
    """
    return size.numel * itemsize * (3 if kind == BACKWARD else 1)


class HeadGroup:
    """All contenders on maps of one type and layout.

    Args:
        plan: what to measure.
        dtype: of the map.
        layout: of LAYOUTS.
        say: told what is going on.
    """

    def __init__(self, plan: HeadPlan, dtype: torch.dtype, layout: str, say: Say = lambda _: None) -> None:
        self.plan, self.dtype, self.layout, self.say = plan, dtype, layout, say
        self.name = str(dtype).removeprefix("torch.")
        self.rows = [HeadRow(each, self.name, layout, plan.size, dtype.itemsize) for each in plan.contenders]
        self.runners: dict[int, HeadRunner] = {}

    def measure(self) -> list[HeadRow]:
        """The finished rows; a contender that cannot run leaves the reason in its row."""
        free, needed = free_memory(self.plan.device), 8 * _REFERENCE_MAPS * self.plan.size.numel
        if free is not None and needed > free:
            reason = f"the comparison would need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            for row in self.rows:
                row.left_out = reason
            return self.rows
        problem = make_head_problem(self.plan.size, self.dtype, self.layout, self.plan.device)
        expected = reference_outcome(problem)
        for index, row in enumerate(self.rows):
            self.say(f"{self.name}, {self.layout}: {row.contender}")
            self._first_runs(index, row, problem, expected)
        del expected
        self._time(problem)
        set_head_speedups(self.rows)
        return self.rows

    def _first_runs(self, index: int, row: HeadRow, problem: HeadProblem, expected: HeadOutcome) -> None:
        if row.contender == COMPILED:
            found = head_compile_seconds(self.plan, self.dtype, self.layout)
            if isinstance(found, str):
                row.left_out = found
                return
            row.compile_seconds = found
        runner = start(row.contender, problem)
        if row.contender == COMPILED:
            outcome = runner.outcome()
        else:
            with Operators() as operators:
                outcome = runner.outcome()
            row.operators = sorted(operators.names)
        if row.contender == KERNELS and not row.operators:
            row.notes.append("no kernel ran")
        # Without autograd another path may be taken, so both are compared.
        for found in (HeadOutcome(runner.run(False), outcome.gradients), outcome):
            disagrees, errors = compare_heads(found, expected, self.dtype)
            row.disagrees = row.disagrees or disagrees
            row.errors = {name: max(error, row.errors.get(name, 0.0)) for name, error in errors.items()}
        if outcome.gradients[0].stride() != problem.features.stride():
            row.notes.append("dX comes in another layout than X")
        row.returned_bytes = sum(x.nbytes for x in (*outcome.results, *outcome.gradients))
        # While gradients are held: memory that the operators keep for the next ones would hide what those take.
        held = [runner.outcome() for _ in range(_HELD)]
        _, row.peak_bytes = peak_above(self.plan.device, lambda: runner.run(True))
        del outcome, found, held
        self.runners[index] = runner

    def _time(self, problem: HeadProblem) -> None:
        device, flush = self.plan.device, CacheFlush(self.plan.device)
        copy = Copy(device, min(max(_COPY_MAPS * problem.features.nbytes, _COPY_BYTES[0]), _COPY_BYTES[1]))
        copy.run()
        bandwidth = Timing()
        turns = {(index, kind): self.plan.repeat for index in self.runners for kind in (FORWARD, BACKWARD)}
        for number, turn in enumerate(rounds(turns)):
            self.say(f"{self.name}, {self.layout}: round {number + 1}")
            gc.collect()
            bandwidth.seconds.append(once(device, copy.run, flush))
            for index, kind in turn:
                run = partial(self.runners[index].run, kind == BACKWARD)
                # Untimed: memory that another contender freed may go back to the system, and somebody waits for that.
                run()
                seconds = once(device, run, flush)
                self.rows[index].seconds.setdefault(kind, Timing()).seconds.append(seconds)
        for index in self.runners:
            self.rows[index].bandwidth = copy.moved_bytes / bandwidth.median


def head_compile_seconds(plan: HeadPlan, dtype: torch.dtype, layout: str) -> float | str:
    """Seconds that the first calls of the compiled head take, forward and with backward; or why they fail."""
    request = {
        "size": plan.size,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "device": str(plan.device),
        "threads": torch.get_num_threads(),
    }
    return trial("from dan_fast.bench.attention import compile_main; compile_main()", request, plan.compile_budget_s)


def compile_main() -> None:
    """Compiles what the first argument asks for and prints the seconds."""
    import json
    import sys

    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["dtype"])
    problem = make_head_problem(MapSize(*request["size"]), dtype, request["layout"], request["device"])
    begin = time.perf_counter()
    runner = start(COMPILED, problem)
    runner.outcome()
    runner.run(False)
    print(time.perf_counter() - begin)


def set_head_speedups(rows: Sequence[HeadRow]) -> None:
    """Ratios of medians between the rows of one type and layout; none with a row that disagrees."""
    agreeing = [row for row in rows if row.seconds and not row.disagrees]
    for row in rows:
        row.speedup = {}
    for row in agreeing:
        for other in agreeing:
            if other is not row and other.contender != KERNELS:
                row.speedup[other.contender] = {
                    kind: other.seconds[kind].median / timing.median for kind, timing in row.seconds.items()
                }


def head_bars(rows: Sequence[HeadRow], layouts: Sequence[str], device_type: str) -> list[Bar]:
    """What the kernels have to reach; a row that disagrees, or in which no kernel ran, has no figure."""
    bars = []

    def find(dtype: str, layout: str) -> HeadRow | None:
        wanted = (KERNELS, dtype, layout)
        found = [row for row in rows if (row.contender, row.dtype, row.layout) == wanted]
        return found[0] if found and found[0].operators and not found[0].disagrees else None

    if device_type != "cpu":
        for dtype, layout in dict.fromkeys((row.dtype, row.layout) for row in rows):
            row = find(dtype, layout)
            share = row.bandwidth_share(BACKWARD) if row else None
            name = f"forward + backward over the time of reading X, reading X and writing dX ({dtype}, {layout})"
            value = None if share is None else 1 / share
            bars.append(at_most(name, f"at most {_FLOOR_FACTOR:g} times", _FLOOR_FACTOR, value))
        return bars
    for layout in layouts:
        row = find("float32", layout)
        for rival, least in ((EAGER, _EAGER_SPEEDUP), (COMPILED, _COMPILED_SPEEDUP)):
            value = row.speedup.get(rival, {}).get(BACKWARD) if row else None
            bars.append(at_least(f"forward + backward against {rival} ({layout})", least, value))
        extra = row.extra_bytes if row else None
        name = f"memory in MB beyond X and the gradients returned ({layout})"
        limit, value = f"below {_EXTRA_BYTES / 1e6:g} MB", None if extra is None else extra / 1e6
        bars.append(Bar(name, limit, value, extra is not None and extra < _EXTRA_BYTES))
    return bars
