"""`dan-fast bench attention`: the attention head's contenders on maps of each type and layout."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch.utils.flop_counter import FlopCounterMode

from dan_fast.bench.attention import contenders
from dan_fast.bench.attention.contenders import COMPILED, EAGER, KERNELS, REFERENCE, HeadOutcome, HeadProblem, MapSize
from dan_fast.bench.benchmark import Bar, Benchmark, at_least, at_most, contenders_of, dtypes_of, one_of
from dan_fast.bench.machine import peak_above
from dan_fast.bench.process import compile_trial
from dan_fast.bench.rows import BACKWARD, FORWARD, Row, plain
from dan_fast.bench.timing import Say, Turn, first_outcome, take_turns
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.free_memory import why_too_large

_EAGER_SPEEDUP, _COMPILED_SPEEDUP, _EXTRA_BYTES, _FLOOR_FACTOR = 8, 3, 5e6, 2
# The copy that measures the bandwidth is so many maps long: a cache must not hold it.
_COPY_MAPS = 8
# More gradients than memory is kept for.
_HELD = 4
# The reference in float64 and what autograd keeps of it.
_REFERENCE_MAPS = 8


def head_bytes(size: MapSize, itemsize: int, kind: str) -> int:
    """The bytes the head cannot do without, a model: X read forward, and X read and dX written backward.

    Example:
        >>> head_bytes(MapSize(), 4, "forward_backward") / 1e6
        77.070336
    """
    return size.numel * itemsize * (3 if kind == BACKWARD else 1)


def head_flop(problem: HeadProblem) -> dict[str, int]:
    """Operations of the head's products in each pass, counted in the PyTorch form."""
    runner, found = contenders.start(EAGER, problem), {}
    for kind in (FORWARD, BACKWARD):
        with FlopCounterMode(display=False) as counter:
            runner.run(kind == BACKWARD)
        found[kind] = counter.get_total_flops()
    return found


@dataclass(kw_only=True)
class AttentionBenchmark(Benchmark):
    """Time the ways to run the attention head side by side, after checking that they agree.

    Args:
        dtype: Types of the map, with commas between: float32, bfloat16, float16, float64.
        layout: Memory layouts of the map, with commas between: contiguous, channels_last.
        contenders: Some of reference, eager, compiled and kernels, with commas between; or all.
        batch: Images (the paper: 64).
        channels: Channels of the map (ResNet-50: 2048).
        height: Rows of the map (images of 224 pixels: 7).
        width: Columns of the map.
        reduction: Dimension reduction ratio r of NL-CBAM (the paper: 12).
        classes: Persons of the classifier, whose rows the class activation map reads (Market-1501: 751).
        compile_budget_s: Seconds that torch.compile may take for one type and layout.
    """

    name: ClassVar[str] = "attention"
    against: ClassVar[tuple[str, ...]] = (REFERENCE, EAGER, COMPILED)
    meaning: ClassVar[dict[str, str]] = {
        "seconds": "of one call; forward is without recording for autograd; repetitions of the contenders in turn, "
        "each after an untimed one and with empty caches",
        "forward_backward": "with the gradients of the map, the six weights and the CAM weight",
        "half precision": "a map in half precision meets float32 weights under autocast, as in training",
        "errors": (
            "against the reference in float64 on the same numbers: the larger of the difference's shares of the "
            "largest number and of the norm"
        ),
        "model_bytes": "a model: what the head cannot do without, X read forward, X read and dX written backward",
        "flop": "of the products of eager, by torch.utils.flop_counter",
        "extra_bytes": "peak_bytes less returned_bytes, the results and gradients, dX among them",
    }

    dtype: str = "float32,bfloat16"
    layout: str = "contiguous,channels_last"
    contenders: str = "all"
    batch: PositiveInt = 64
    channels: PositiveInt = 2048
    height: PositiveInt = 7
    width: PositiveInt = 7
    reduction: PositiveInt = 12
    classes: PositiveInt = 751
    repeat: PositiveInt = 15
    compile_budget_s: PositiveFloat = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dtype, self.layout = dtypes_of(self.dtype), one_of("layout", self.layout, contenders.LAYOUTS)
        self.contenders = contenders_of(self.contenders, contenders.CONTENDERS)
        self.size = MapSize(self.batch, self.channels, self.height, self.width, self.reduction, self.classes)

    def groups(self, say: Say) -> Iterator[list[Row]]:
        for dtype, layout in itertools.product(self.dtype, self.layout):
            yield self._group(dtype, layout, say)

    def _group(self, dtype: torch.dtype, layout: str, say: Say) -> list[Row]:
        of = {"dtype": plain(dtype), "layout": layout, "size": self.size, "itemsize": dtype.itemsize}
        rows = [row_of(each, of) for each in self.contenders]
        if reason := why_too_large(self.place, 8 * _REFERENCE_MAPS * self.size.numel, "the comparison"):
            for row in rows:
                row.leave_out(reason)
            return rows
        problem, turns = contenders.make_head_problem(self.size, dtype, layout, self.place), []
        expected, flop = contenders.reference_outcome(problem), head_flop(problem)
        for row in rows:
            row.flop = flop
            say(f"{of['dtype']}, {layout}: {row.name}")
            turns += self._first_runs(row, problem, expected)
        del expected
        take_turns(self.place, turns, say, _COPY_MAPS * problem.features.nbytes, statistics_dtype(dtype), warm=True)
        return rows

    def _first_runs(self, row: Row, problem: HeadProblem, expected: HeadOutcome) -> list[Turn]:
        compiled, dtype = row.contender == COMPILED, problem.features.dtype
        make = partial(contenders.make_head_problem, self.size, dtype, row.of["layout"], self.place)
        start = partial(contenders.start, row.contender)
        if compiled and (reason := compile_trial(row, make, start, self.compile_budget_s)):
            row.leave_out(reason)
            return []
        runner = start(problem)
        outcome = first_outcome(row, runner, compiled)
        if row.contender == KERNELS and not row.operators:
            row.notes.append("no kernel ran")
        # Without autograd another path may be taken, so both are compared.
        row.compared_with = "the reference"
        for found in (HeadOutcome(runner.run(False), outcome.gradients), outcome):
            disagrees, errors = contenders.compare_heads(found, expected, dtype)
            row.disagrees = row.disagrees or disagrees
            row.errors = {name: max(error, row.errors.get(name, 0.0)) for name, error in errors.items()}
        if outcome.gradients[0].stride() != problem.features.stride():
            row.notes.append("dX comes in another layout than X")
        row.returned_bytes = sum(x.nbytes for x in (*outcome.results, *outcome.gradients))
        # While gradients are held: memory that the operators keep for the next ones would hide what those take.
        held = [runner.outcome() for _ in range(_HELD)]
        _, row.peak_bytes = peak_above(self.place, lambda: runner.run(True))
        del held
        return [Turn(row, kind, partial(runner.run, kind == BACKWARD), self.repeat) for kind in row.passes]

    def title(self, rows: Sequence[Row]) -> str:
        return f"{rows[0].of['dtype']}, {rows[0].of['layout']}: {' x '.join(map(str, self.size[:4]))}"

    def figures(self, row: Row) -> dict[str, Any]:
        return {"left_out": row.left_out.get(FORWARD)}

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """What the kernels have to reach; a row that disagrees, or in which no kernel ran, has no figure."""
        kernels = {}
        for row in rows:
            if row.contender == KERNELS and row.operators and not row.disagrees:
                kernels[row.of["dtype"], row.of["layout"]] = row
        bars = []
        if self.place.type != "cpu":
            for dtype, layout in dict.fromkeys((row.of["dtype"], row.of["layout"]) for row in rows):
                share = kernels.get((dtype, layout), Row(KERNELS)).bandwidth_share(BACKWARD)
                name = f"forward + backward over the time of reading X, reading X and writing dX ({dtype}, {layout})"
                bars.append(at_most(name, _FLOOR_FACTOR, share and 1 / share))
            return bars
        for layout in self.layout:
            row = kernels.get(("float32", layout), Row(KERNELS))
            for rival, least in ((EAGER, _EAGER_SPEEDUP), (COMPILED, _COMPILED_SPEEDUP)):
                name = f"forward + backward against {rival} ({layout})"
                bars.append(at_least(name, least, row.ratio(rival, BACKWARD)))
            name, extra = f"memory in MB beyond X and the gradients returned ({layout})", row.extra_bytes
            met = extra is not None and extra < _EXTRA_BYTES
            bars.append(Bar(name, f"below {_EXTRA_BYTES / 1e6:g} MB", extra and extra / 1e6, met))
        return bars

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"tolerances": {dtype: contenders.TOLERANCES[dtype] for dtype in self.dtype}}


def row_of(contender: str, of: dict[str, Any], **figures: Any) -> Row:
    """The row of a contender on a map."""
    bytes_of = {kind: head_bytes(of["size"], of["itemsize"], kind) for kind in (FORWARD, BACKWARD)}
    return Row(contender, of, model_bytes=bytes_of, **figures)
