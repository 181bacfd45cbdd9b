"""`dan-fast bench memory`: the memory step's contenders at each size and type."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from dan_fast import _extension
from dan_fast.bench.benchmark import DTYPES, Bar, Benchmark, at_least, at_most, contenders_of, one_of
from dan_fast.bench.machine import peak_above, why_no_triton
from dan_fast.bench.memory import contenders
from dan_fast.bench.memory.contenders import COMPILED, IN_PLACE, KERNELS, LITERAL, SCORE_SPACE, Contender, Outcome
from dan_fast.bench.memory.problem import MODULE, PAPER, STEP, Problem, Size, make_problem, model_bytes, product_flop
from dan_fast.bench.process import compile_trial
from dan_fast.bench.rows import BACKWARD, FORWARD, LeftOut, Row, pair, plain
from dan_fast.bench.timing import Say, first_outcome, once, repetitions, take_turns
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.devices import synchronize
from dan_fast.core.errors import DanFastError
from dan_fast.core.free_memory import why_too_large
from dan_fast.triton_kernels import Products, float32_products

BEST_PYTORCH = "best_pytorch"
# Of Table II's memory on two CPU cores, or on any GPU.
_CPU_SPEEDUP, _GPU_SPEEDUP, _IN_PLACE_SPEEDUP, _PYTORCH_SPEEDUP = 150, 100, 20, 2
_PEAK_MEGABYTES = 100
_LINEAR_TO, _LINEAR_SLACK = 16, 1.25
# Seconds of each dependent step, and how much longer than for its bytes a GPU may take beside them.
_STEP_SECONDS, _FLOOR_FACTOR = 4e-6, 2.5
# Data sheets: bytes a second, and operations a second on tensor cores without sparsity, added in float32.
_GPUS = (
    {"name": "RTX 3090", "bandwidth": 936e9, "float32": 35.6e12, "tf32": 35.6e12, "bfloat16": 71e12},
    {"name": "H100 SXM", "bandwidth": 3.35e12, "float32": 66.9e12, "tf32": 494.7e12, "bfloat16": 989.4e12},
)
# The literal forms are tried at so many slots of M to foresee their time and memory, which are linear in the slots.
_PROBE_SLOTS = 140
_MARGIN = 1.2


def foresee(contender: Contender, size: Size, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds and bytes of one run of a literal contender, from a run with few slots; zeros where `size` has few."""
    ratio = size.labeled_slots / _PROBE_SLOTS
    if ratio <= 2:
        return 0.0, 0.0
    problem = make_problem(size.scaled(1 / ratio), dtype, device, batches=1)
    contender.start(problem).outcome()
    runner = contender.start(problem)
    start = time.perf_counter()
    _, peak = peak_above(device, runner.outcome)
    synchronize(device)
    return ratio * (time.perf_counter() - start), ratio * (peak or 0)


@dataclass(kw_only=True)
class MemoryBenchmark(Benchmark):
    """Time the ways to compute a memory step side by side, after checking that they agree.

    Args:
        slots_scale: Sizes as multiples of the slots, separated by commas.
        dtype: Types of keys and memories, separated by commas: float32, bfloat16, float16, float64.
        contenders: Some of literal_autograd, literal_in_place, score_space, score_space_compiled and kernels, separated
            by commas; or all.
        steps: Steps that a module takes in a repetition before its pending writes are made.
        budget_s: Seconds that all repetitions of a contender's pass may take together; a pass is left out if a single
            repetition would take longer.
        compile_budget_s: Seconds that torch.compile may take at one size and type; after a failure it is not tried
            again. PyTorch's cache keeps what was compiled for the next run.
        labeled_slots: Slots of M at scale 1 (the paper: 9000).
        unlabeled_slots: Slots of M' at scale 1 (the paper: 5500).
        key_dim: Length of a key (the paper: 2045).
        batch: Labelled samples per step, with as many unlabelled ones (the paper: 32).
        products: How the kernels multiply float32 on a GPU, like memory.products of a training: float32 or tf32x3.
    """

    name: ClassVar[str] = "memory"
    bars_title: ClassVar[str] = "Bars: float32, 1 x slots"
    columns: ClassVar[tuple[str, ...]] = ("use",)
    against: ClassVar[tuple[str, ...]] = (LITERAL, IN_PLACE)
    meaning: ClassVar[dict[str, str]] = {
        "seconds": "of a step; forward is without recording for autograd; repetitions of the contenders in turn",
        "step": "pure: from one common state, the new memories are returned",
        "module": "the memory steps its own state; `steps` steps and the write of what they left pending, over `steps`",
        "model_bytes": "a model: what a step cannot do without, 2 (module) or 3 (step) passes over (s1+s2) d numbers "
        "forward, one more with backward",
        "floor_seconds": "as limit_seconds; its operations are those of gflops, whatever a contender makes beyond them",
        "float32_rate": "as rate; null where a GPU's products are not of float32",
        "gflops": "of the products of score space, scores, commit and backward; not of the literal loops",
        "best_pytorch": "the faster of score_space and score_space_compiled in the same use",
        "peak_extra_bytes": "peak_bytes less returned_bytes, the new memories that a pure step returns",
    }

    slots_scale: str = "1,0.25,4,16"
    dtype: str = "float32,bfloat16"
    contenders: str = "all"
    steps: PositiveInt = 8
    budget_s: PositiveFloat = 90.0
    compile_budget_s: NonNegativeFloat = 300.0
    labeled_slots: PositiveInt = PAPER.labeled_slots
    unlabeled_slots: PositiveInt = PAPER.unlabeled_slots
    key_dim: PositiveInt = PAPER.key_dim
    batch: PositiveInt = PAPER.batch
    products: Products = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.slots_scale = [_scale(part) for part in self.slots_scale.split(",")]
        self.dtype = [DTYPES[name] for name in one_of("dtype", self.dtype, DTYPES)]
        self.contenders = contenders_of(self.contenders, contenders.NAMES)
        self._chosen = [each for each in contenders.CONTENDERS if each.name in self.contenders]
        self.size = Size(self.labeled_slots, self.unlabeled_slots, self.key_dim, self.batch)
        # Why a contender is not tried again, by its name.
        self._gave_up: dict[str, str] = {}

    def groups(self, say: Say) -> Iterator[tuple[str, list[Row]]]:
        for dtype, scale in itertools.product(self.dtype, self.slots_scale):
            with float32_products(self.products):
                rows = self._group(scale, dtype, say)
            size = self.size.scaled(scale)
            slots = f"{scale:g} x slots: {size.labeled_slots} and {size.unlabeled_slots} slots of {size.key_dim}"
            yield f"{plain(dtype)}, {slots}, {size.batch} + {size.batch} samples a step", rows

    def _group(self, scale: float, dtype: torch.dtype, say: Say) -> list[Row]:
        """All contenders on one problem; one that fails leaves the reason in its row."""
        size = self.size.scaled(scale)
        memories = size.slots * self.key_dim * dtype.itemsize
        of = {"dtype": plain(dtype), "itemsize": dtype.itemsize, "scale": scale, "size": size}
        rows = [row_of(each, of) for each in self._chosen]
        if reason := why_too_large(self.place, 2 * memories, "the memories"):
            for row in rows:
                row.leave_out(reason)
            return rows
        problem = make_problem(size, dtype, self.place, batches=self.steps)
        outcome = expected = compared_with = None
        # Every contender's first step is compared with the literal one, or with score space where that is left out;
        # those without a backward pass come last, so that there is something to compare them with.
        pairs = sorted(zip(rows, self._chosen, strict=True), key=lambda pair: BACKWARD not in pair[0].passes)
        for row, contender in pairs:
            say(f"{of['dtype']}, {scale:g} x slots: {row.name}")
            with row.tried():
                if reason := self._why_not(row, contender, dtype):
                    raise LeftOut(reason)
                outcome = self._first_runs(row, contender, problem)
                if expected is not None:
                    row.compared_with = compared_with
                    row.disagrees, row.errors = contenders.compare(outcome, expected, dtype)
                elif BACKWARD in row.passes:
                    expected, compared_with = outcome, contender.name
                else:
                    row.notes.append("nothing to compare with")
        del outcome, expected
        # On a GPU others go through tensor cores, three products for each one.
        in_float32 = self.products == "float32" and dtype != torch.bfloat16
        rated = statistics_dtype(dtype) if in_float32 or self.place.type == "cpu" else None
        take_turns(self.place, rows, say, memories, rated)
        return rows

    def _why_not(self, row: Row, contender: Contender, dtype: torch.dtype) -> str | None:
        """Why the contender does not run at all."""
        if contender.name in self._gave_up:
            return self._gave_up[contender.name]
        if contender.name == KERNELS:
            return _extension.why_not_on(self.place.type, self.place.index) or why_no_triton(self.place)
        if contender.literal:
            seconds, needed = foresee(contender, row.of["size"], dtype, self.place)
            if seconds > self.budget_s:
                return f"a run would take about {seconds:.0f} s, the budget is {self.budget_s:.0f} s"
            return why_too_large(self.place, _MARGIN * needed, "a run") if needed else None
        if contender.name == COMPILED:
            make = partial(make_problem, row.of["size"], dtype, self.place, batches=1)
            if reason := compile_trial(row, make, contender.start, self.compile_budget_s):
                self._gave_up[contender.name] = f"{reason}, at {row.of['scale']:g} x slots in {plain(dtype)}"
                return reason
        return None

    def _first_runs(self, row: Row, contender: Contender, problem: Problem) -> Outcome:
        """The step that is compared, the memory of a run, and as many calls as the budget has room for."""
        runner = contender.start(problem)
        row.steps, row.returned_bytes = runner.steps, runner.returned_bytes
        calls = {kind: partial(runner.run, kind == BACKWARD) for kind in row.passes}
        if contender.literal:
            # So slow that the run to compare has to serve for memory and time as well.
            start = time.perf_counter()
            outcome, row.peak_bytes = peak_above(self.place, runner.outcome)
            first = dict.fromkeys(calls, time.perf_counter() - start)
        else:
            outcome = first_outcome(row, runner.outcome, contender.name == COMPILED)
            runner.run(False)
            _, row.peak_bytes = peak_above(self.place, calls[BACKWARD])
            first = {kind: once(self.place, call) for kind, call in calls.items()}
        for kind, seconds in first.items():
            if seconds > self.budget_s and not contender.literal:
                row.leave_out(f"a run takes {seconds:.0f} s, the budget is {self.budget_s:.0f} s", kind)
            else:
                row.calls[kind] = calls[kind], repetitions(seconds, self.repeat, self.budget_s)
        return outcome

    def rivals(self, row: Row, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """The literal forms, and for kernels the faster of the PyTorch paths in the same use."""
        found = super().rivals(row, rows)
        if row.contender == KERNELS:
            paths = [other for other in rows if other.contender in (SCORE_SPACE, COMPILED)]
            found[BEST_PYTORCH] = [other for other in paths if other.of["use"] == row.of["use"]]
        return found

    def figures(self, row: Row) -> dict[str, Any]:
        # The literal loops make other products, sample by sample.
        flop = {} if row.contender in (LITERAL, IN_PLACE) else row.flop
        gflops = row.of_each(lambda kind: flop[kind] / row.seconds[kind].median / 1e9 if flop else None)
        figures = {"floor_seconds": row.of_each(row.limits), "float32_rate": row.rate}
        return figures | {"gflops": gflops, "peak_extra_bytes": row.extra_bytes}

    def cells(self, row: Row) -> dict[str, str]:
        return {"GFLOP/s": pair(self.figures(row)["gflops"], ".1f")}

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """Of float32 at scale 1."""
        kernels = (row for row in rows if row.contender == KERNELS and row.of["dtype"] == "float32")
        found = {(row.of["use"], row.of["scale"]): row for row in kernels if not row.disagrees}
        # One that was not measured has no figures.
        both = [found.get((use, 1), Row(KERNELS, {"use": use})) for use in (STEP, MODULE)]
        on_cpu, module = self.place.type == "cpu", both[1]

        def faster(rival: str, words: str, least: float) -> list[Bar]:
            words = f"forward + backward against {words}"
            return [at_least(f"{words} ({row.of['use']})", least, row.ratio(rival, BACKWARD)) for row in both]

        bars = faster(LITERAL, LITERAL, _CPU_SPEEDUP if on_cpu else _GPU_SPEEDUP)
        if not on_cpu:
            limit, value = math.nan, None
            if module.bandwidth:
                limit = (_FLOOR_FACTOR * module.limits(BACKWARD)["bytes"] + _STEP_SECONDS * 2 * self.batch) * 1e3
                value = module.seconds[BACKWARD].median * 1e3 if BACKWARD in module.seconds else None
            text = f"at most {limit:.3g} ms: 2.5 x 3 (s1+s2) d bytes / copy bandwidth + 4 us x dependent steps"
            return [*bars, at_most("forward + backward in ms (module)", limit, value, limit=text)]
        in_place = module.ratio(IN_PLACE, FORWARD)
        bars.append(at_least(f"forward against {IN_PLACE} (module)", _IN_PLACE_SPEEDUP, in_place))
        bars += faster(BEST_PYTORCH, "the best PyTorch path", _PYTORCH_SPEEDUP)
        for row in both:
            words, extra = f"peak memory above the memories in MB ({row.of['use']})", row.extra_bytes
            bars.append(at_most(words, _PEAK_MEGABYTES, extra and extra / 1e6, "MB"))
        for row in both:
            larger, value = found.get((row.of["use"], _LINEAR_TO)), None
            if larger and all(BACKWARD in each.seconds for each in (row, larger)):
                small, large = (each.seconds[BACKWARD].median / each.of["size"].slots for each in (row, larger))
                value = large / small
            limit = f"time a slot at x {_LINEAR_TO} at most {_LINEAR_SLACK} times that at x 1"
            bars.append(at_most(f"linear in slots ({row.of['use']})", _LINEAR_SLACK, value, limit=limit))
        return bars

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        tolerances = {dtype: contenders.TOLERANCES[dtype] for dtype in self.dtype}
        return {"tolerances": tolerances, "prediction": predict(self.size, self.slots_scale)}

    def more_tables(self, rows: Sequence[Row]) -> dict[str, list[dict[str, str]]]:
        found = predict(self.size, self.slots_scale)
        table = [
            {key: value if isinstance(value, str) else f"{value:.4g}" for key, value in row.items()}
            for row in found["rows"]
        ]
        return {f"PREDICTION, nothing here was measured: forward + backward. {found['formula']}": table}


def row_of(contender: Contender, of: dict[str, Any], **figures: Any) -> Row:
    """The row of a contender on a problem."""
    name, passes = f"{contender.name} ({contender.use})", (FORWARD, BACKWARD)
    moved = {kind: model_bytes(of["size"], of["itemsize"], contender.use, kind) for kind in passes}
    flop = {kind: product_flop(of["size"], kind) for kind in passes}
    of = of | {"use": contender.use}
    return Row(contender.name, of, contender.passes, name, model_bytes=moved, flop=flop, **figures)


def predict(size: Size, scales: Sequence[float]) -> dict[str, Any]:
    """The roofline model of forward + backward for GPUs by their data sheets; nothing of it is measured."""
    rows = []
    # Type, bytes a number, the products that each one takes, and at which rate.
    forms = (("float32", 4, 1, "float32"), ("float32 as tf32x3", 4, 3, "tf32"), ("bfloat16", 2, 3, "bfloat16"))
    for gpu, (name, itemsize, products, rate), scale in itertools.product(_GPUS, forms, scales):
        scaled = size.scaled(scale)
        moved = model_bytes(scaled, itemsize, MODULE, BACKWARD)
        flop = products * product_flop(scaled, BACKWARD)
        figures = {"bytes_ms": moved / gpu["bandwidth"] * 1e3, "operations_ms": flop / gpu[rate] * 1e3}
        floor = max(figures.values())
        figures |= {"floor_ms": floor, "with_scan_ms": floor + _STEP_SECONDS * 2 * scaled.batch * 1e3}
        problem = {"gpu": gpu["name"], "dtype": name, "scale": scale, "bytes": moved, "flop": flop}
        rows.append(problem | figures)
    return {
        "what": "a prediction by a model, not a measurement",
        "gpus": _GPUS,
        "formula": (
            "bytes: 3 (s1 + s2) d numbers at the memory's bandwidth; operations: of the products of scores, commit and "
            "backward, thrice where each takes three; with scan = the longer one + 4 us x (B + B') dependent steps"
        ),
        "rows": rows,
    }


def _scale(part: str) -> float:
    try:
        scale = float(part)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise DanFastError(f"slots_scale: {part.strip()!r} is no positive number: write them as 0.25,1,4,16.")
    return scale
