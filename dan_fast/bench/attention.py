"""`dan-fast bench attention`: the attention head's contenders on maps of each type and layout."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from dan_fast import _extension, functional, reference
from dan_fast.bench.agreement import Agreement, compare_tensors
from dan_fast.bench.benchmark import DTYPES, Bar, Benchmark, at_least, at_most, contenders_of, one_of
from dan_fast.bench.machine import peak_above
from dan_fast.bench.process import compile_trial
from dan_fast.bench.rows import BACKWARD, FORWARD, Row, plain
from dan_fast.bench.timing import Say, first_outcome, take_turns
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.free_memory import why_too_large
from dan_fast.core.types import AttentionHeadOutput, NLCBAMWeights
from dan_fast.nn import NLCBAM

# The paper in PyTorch, sample by sample and with X''; the package's own PyTorch form, as it is and compiled; kernels.
REFERENCE, EAGER, COMPILED, KERNELS = CONTENDERS = ("reference", "eager", "compiled", "kernels")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# How far a result may be from the reference in float64, as a share of its largest number and of its norm. In half
# precision the statistics are float32 still; only the map's gradient is rounded to 8 or 11 bits.
TOLERANCES = {
    torch.float64: {"results": 1e-10, "gradients": 1e-10, "map_gradient": 1e-10},
    torch.float32: {"results": 1e-5, "gradients": 1e-4, "map_gradient": 1e-4},
    torch.bfloat16: {"results": 1e-5, "gradients": 1e-4, "map_gradient": 2**-8},
    torch.float16: {"results": 1e-5, "gradients": 1e-4, "map_gradient": 2**-10},
}
_EAGER_SPEEDUP, _COMPILED_SPEEDUP, _EXTRA_MEGABYTES, _FLOOR_FACTOR = 8, 3, 5, 2
# The copy that measures the bandwidth is so many maps long: a cache must not hold it.
_COPY_MAPS = 8
# More gradients than memory is kept for.
_HELD = 4
# The reference in float64 and what autograd keeps of it.
_REFERENCE_MAPS = 8


class MapSize(NamedTuple):
    """The last map (B, C, H, W), the ratio r of NL-CBAM's bottlenecks, and the classifier's persons."""

    batch: int = 64
    channels: int = 2048
    height: int = 7
    width: int = 7
    reduction: int = 12
    classes: int = 751


class HeadProblem(NamedTuple):
    """Everything an attention head takes, and the gradient that reaches it.

    Attributes:
        features: (B, C, H, W), the map as a ReLU leaves it.
        weights, cam_weight: in the dtype of statistics, leaves of the graph.
        labels: (B,) int64, every other one -1, as half a batch is unlabelled.
        slopes: of the loss in `attended`, `pooled` and `adversary_loss`; both attentions are by-products.
    """

    features: Tensor
    weights: NLCBAMWeights
    cam_weight: Tensor
    labels: Tensor
    slopes: tuple[Tensor, Tensor, Tensor]


def make_head_problem(size: MapSize, dtype: torch.dtype, layout: str, device: torch.device | str) -> HeadProblem:
    """The same map, weights and slopes on the same device."""
    device, wide = torch.device(device), statistics_dtype(dtype)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=wide)

    features = draw(*size[:4]).relu_().to(dtype).contiguous(memory_format=LAYOUTS[layout])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        attention = NLCBAM(size.channels, size.height * size.width, size.reduction)
    weights = NLCBAMWeights(*(_leaf(weight.to(device, wide)) for weight in attention.weights))
    cam_weight = _leaf(draw(size.classes, size.channels) / size.channels**0.5)
    labels = torch.randint(size.classes, (size.batch,), generator=generator, device=device)
    labels[1::2] = -1
    attended, pooled = draw(2, size.batch, size.channels)
    slopes = (attended, pooled, torch.full((size.batch,), 1 / size.batch, dtype=wide, device=device))
    return HeadProblem(features, weights, cam_weight, labels, slopes)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


class HeadOutcome(NamedTuple):
    """Everything the head returns, and the gradients of the map, the weights and the CAM weight; () without."""

    results: AttentionHeadOutput
    gradients: tuple[Tensor, ...] = ()


@dataclass
class HeadRunner:
    """A head on one problem, called in a context; half-precision maps meet float32 weights under autocast."""

    problem: HeadProblem
    head: Callable[..., AttentionHeadOutput]
    context: Callable[[], AbstractContextManager] = nullcontext

    def run(self, backward: bool) -> HeadOutcome:
        """Forward without autograd, or forward and all gradients; returns what a caller would hold."""
        features, weights, cam_weight, labels, slopes = self.problem
        with self.context(), torch.set_grad_enabled(backward):
            if backward:
                features = _leaf(features)
            with torch.autocast(features.device.type, features.dtype, enabled=features.dtype.itemsize < 4):
                results = self.head(features, weights, cam_weight, labels)
            if not backward:
                return HeadOutcome(results)
            trained = results.attended, results.pooled, results.adversary_loss
            slopes = [slope.to(of.dtype) for slope, of in zip(slopes, trained, strict=True)]
            gradients = torch.autograd.grad(trained, [features, *weights, cam_weight], slopes)
            return HeadOutcome(AttentionHeadOutput(*(x.detach() for x in results)), gradients)


def start(name: str, problem: HeadProblem) -> HeadRunner:
    """The runner of a contender."""
    head = _literal if name == REFERENCE else functional.attention_head
    if name == COMPILED:
        # Whatever was traced for another map would only be in the way, and is no part of the time to compile this one.
        torch.compiler.reset()
        head = torch.compile(functional.attention_head, dynamic=False)
    return HeadRunner(problem, head, _extension.disabled if name in (EAGER, COMPILED) else nullcontext)


def _literal(x: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    with torch.autocast(x.device.type, enabled=False):
        return reference.attention_head(x.to(cam_weight.dtype), weights, cam_weight, labels)


def reference_outcome(problem: HeadProblem) -> HeadOutcome:
    """What the paper's form gives in float64 for the numbers of the problem."""
    wide = tree_map(lambda x: _leaf(x.double()) if x.is_floating_point() else x, problem)
    return HeadRunner(wide, reference.attention_head).run(True)


def compare_heads(outcome: HeadOutcome, expected: HeadOutcome, dtype: torch.dtype) -> Agreement:
    """All five results and all gradients; an error is a share of the largest number or of the norm, whichever is more.

    Example:
        >>> problem = make_head_problem(MapSize(2, 24, 3, 2, 2, 5), torch.float64, "contiguous", "cpu")
        >>> compare_heads(start("eager", problem).run(True), reference_outcome(problem), torch.float64).disagrees
    """
    names = {name: "results" for name in AttentionHeadOutput._fields} | {"gradient of features": "map_gradient"}
    names |= {f"gradient of {name}": "gradients" for name in (*NLCBAMWeights._fields, "cam_weight")}
    pairs = zip(names.items(), (*outcome[0], *outcome[1]), (*expected[0], *expected[1]), strict=True)
    return compare_tensors(((name, *both, TOLERANCES[dtype][kind]) for (name, kind), *both in pairs), 2, math.inf)


@dataclass(kw_only=True)
class AttentionBenchmark(Benchmark):
    """Time the ways to run the attention head side by side, after checking that they agree.

    Args:
        dtype: Types of the map, separated by commas: float32, bfloat16, float16, float64.
        layout: Memory layouts of the map, separated by commas: contiguous, channels_last.
        contenders: Some of reference, eager, compiled and kernels, separated by commas; or all.
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
        "errors": "against the reference in float64 on the same numbers: the larger of the difference's shares of the "
        "largest number and of the norm",
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
        self.dtype = [DTYPES[name] for name in one_of("dtype", self.dtype, DTYPES)]
        self.layout = one_of("layout", self.layout, LAYOUTS)
        self.contenders = contenders_of(self.contenders, CONTENDERS)
        self.size = MapSize(self.batch, self.channels, self.height, self.width, self.reduction, self.classes)

    def groups(self, say: Say) -> Iterator[tuple[str, list[Row]]]:
        for dtype, layout in itertools.product(self.dtype, self.layout):
            of = {"dtype": plain(dtype), "layout": layout, "size": self.size, "itemsize": dtype.itemsize}
            rows = [row_of(each, of) for each in self.contenders]
            if reason := why_too_large(self.place, 8 * _REFERENCE_MAPS * math.prod(self.size[:4]), "the comparison"):
                for row in rows:
                    row.leave_out(reason)
            else:
                self._measure(rows, partial(make_head_problem, self.size, dtype, layout, self.place), say)
            yield f"{of['dtype']}, {layout}: {' x '.join(map(str, self.size[:4]))}", rows

    def _measure(self, rows: list[Row], make: Callable[[], HeadProblem], say: Say) -> None:
        problem, flop = make(), {}
        expected, eager = reference_outcome(problem), start(EAGER, problem)
        for kind in (FORWARD, BACKWARD):
            with FlopCounterMode(display=False) as counter:
                eager.run(kind == BACKWARD)
            flop[kind] = counter.get_total_flops()
        for row in rows:
            row.flop = flop
            say(f"{row.of['dtype']}, {row.of['layout']}: {row.name}")
            begin = partial(start, row.contender)
            if row.contender == COMPILED and (reason := compile_trial(row, make, begin, self.compile_budget_s)):
                row.leave_out(reason)
            else:
                self._first_runs(row, begin(problem), expected)
        del expected
        arithmetic = statistics_dtype(problem.features.dtype)
        take_turns(self.place, rows, say, _COPY_MAPS * problem.features.nbytes, arithmetic, warm=True)

    def _first_runs(self, row: Row, runner: HeadRunner, expected: HeadOutcome) -> None:
        features, step = runner.problem.features, partial(runner.run, True)
        outcome = first_outcome(row, step, row.contender == COMPILED)
        if row.contender == KERNELS and not row.operators:
            row.notes.append("no kernel ran")
        # Without autograd another path may be taken, so both are compared.
        row.compared_with = "the reference"
        for found in (runner.run(False)._replace(gradients=outcome.gradients), outcome):
            disagrees, errors = compare_heads(found, expected, features.dtype)
            row.disagrees = row.disagrees or disagrees
            row.errors = {name: max(error, row.errors.get(name, 0.0)) for name, error in errors.items()}
        if outcome.gradients[0].stride() != features.stride():
            row.notes.append("dX comes in another layout than X")
        row.returned_bytes = sum(x.nbytes for x in (*outcome.results, *outcome.gradients))
        # While gradients are held: memory that the operators keep for the next ones would hide what those take.
        held = [step() for _ in range(_HELD)]
        _, row.peak_bytes = peak_above(self.place, step)
        del held
        row.calls = {kind: (partial(runner.run, kind == BACKWARD), self.repeat) for kind in row.passes}

    def figures(self, row: Row) -> dict[str, Any]:
        return {"left_out": row.left_out.get(FORWARD)}

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """What the kernels have to reach; a row that disagrees, or in which no kernel ran, has no figure."""
        right = (row for row in rows if row.contender == KERNELS and row.operators and not row.disagrees)
        kernels = {(row.of["dtype"], row.of["layout"]): row for row in right}
        bars, none = [], Row(KERNELS)
        if self.place.type != "cpu":
            for dtype, layout in dict.fromkeys((row.of["dtype"], row.of["layout"]) for row in rows):
                share = kernels.get((dtype, layout), none).bandwidth_share(BACKWARD)
                name = f"forward + backward over the time of reading X, reading X and writing dX ({dtype}, {layout})"
                bars.append(at_most(name, _FLOOR_FACTOR, share and 1 / share))
            return bars
        for layout in self.layout:
            row = kernels.get(("float32", layout), none)
            for rival, least in ((EAGER, _EAGER_SPEEDUP), (COMPILED, _COMPILED_SPEEDUP)):
                name = f"forward + backward against {rival} ({layout})"
                bars.append(at_least(name, least, row.ratio(rival, BACKWARD)))
            name, extra = f"memory in MB beyond X and the gradients returned ({layout})", row.extra_bytes
            bars.append(at_most(name, _EXTRA_MEGABYTES, extra and extra / 1e6, "MB"))
        return bars

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"tolerances": {dtype: TOLERANCES[dtype] for dtype in self.dtype}}


def row_of(contender: str, of: dict[str, Any], **figures: Any) -> Row:
    """The row of a contender on a map, with what the head cannot do without: X read; read again, and dX written."""
    read = math.prod(of["size"][:4]) * of["itemsize"]
    return Row(contender, of, model_bytes={FORWARD: read, BACKWARD: 3 * read}, **figures)
