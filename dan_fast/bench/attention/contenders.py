"""What the attention head is timed on, ways to run it as a user would, and whether they say the same."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast import _extension, functional, reference
from dan_fast.bench.agreement import Agreement, Pair, compare_pairs
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.types import AttentionHeadOutput, NLCBAMWeights
from dan_fast.nn import NLCBAM

# The paper in PyTorch, sample by sample and with X''; the package's own PyTorch form, as it is and compiled; kernels.
REFERENCE, EAGER, COMPILED, KERNELS = CONTENDERS = ("reference", "eager", "compiled", "kernels")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# What the training loss reads; both attentions are by-products.
_TRAINED = ("attended", "pooled", "adversary_loss")
_GRADIENTS = ("features", *NLCBAMWeights._fields, "cam_weight")

# How far a result may be from the reference in float64, as a share of its largest number and of its norm. In half
# precision the statistics are float32 still; only the map's gradient is rounded to 8 or 11 bits.
TOLERANCES = {
    torch.float64: {"results": 1e-10, "gradients": 1e-10, "map_gradient": 1e-10},
    torch.float32: {"results": 1e-5, "gradients": 1e-4, "map_gradient": 1e-4},
    torch.bfloat16: {"results": 1e-5, "gradients": 1e-4, "map_gradient": 2**-8},
    torch.float16: {"results": 1e-5, "gradients": 1e-4, "map_gradient": 2**-10},
}


class MapSize(NamedTuple):
    """The last map (B, C, H, W), the ratio r of NL-CBAM's bottlenecks, and the classifier's persons."""

    batch: int = 64
    channels: int = 2048
    height: int = 7
    width: int = 7
    reduction: int = 12
    classes: int = 751

    @property
    def numel(self) -> int:
        return self.batch * self.channels * self.height * self.width


class HeadProblem(NamedTuple):
    """Everything an attention head takes, and the gradient that reaches it.

    Attributes:
        features: (B, C, H, W), the map as a ReLU leaves it.
        weights, cam_weight: in the dtype of statistics.
        labels: (B,) int64, every other one -1, as half a batch is unlabelled.
        slopes: of the loss in `attended`, `pooled` and `adversary_loss`.
    """

    features: Tensor
    weights: NLCBAMWeights
    cam_weight: Tensor
    labels: Tensor
    slopes: tuple[Tensor, Tensor, Tensor]

    def double(self) -> "HeadProblem":
        """The same numbers in float64."""
        weights = NLCBAMWeights(*(_leaf(weight.double()) for weight in self.weights))
        slopes = tuple(slope.double() for slope in self.slopes)
        return HeadProblem(self.features.double(), weights, _leaf(self.cam_weight.double()), self.labels, slopes)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def make_head_problem(size: MapSize, dtype: torch.dtype, layout: str, device: torch.device | str) -> HeadProblem:
    """The same map, weights and slopes on the same device.

    Example:
        >>> make_head_problem(MapSize(2, 8, 3, 2, classes=5), torch.float32, "channels_last", "cpu").labels.shape
        torch.Size([2])
    """
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


class HeadOutcome(NamedTuple):
    """Everything the head returns, and the gradients as in `_GRADIENTS`."""

    results: AttentionHeadOutput
    gradients: tuple[Tensor, ...]


@dataclass
class HeadRunner:
    """A head on one problem, called in a context; half-precision maps meet float32 weights under autocast."""

    problem: HeadProblem
    head: Callable[..., AttentionHeadOutput]
    context: Callable[[], AbstractContextManager] = nullcontext

    def run(self, backward: bool) -> AttentionHeadOutput | HeadOutcome:
        """Forward without autograd, or forward and all gradients; returns what a caller would hold."""
        features, weights, cam_weight, labels, slopes = self.problem
        with self.context(), torch.set_grad_enabled(backward):
            if backward:
                features = features.detach().requires_grad_()
            with torch.autocast(features.device.type, features.dtype, enabled=features.dtype.itemsize < 4):
                results = self.head(features, weights, cam_weight, labels)
            if not backward:
                return results
            trained = [getattr(results, name) for name in _TRAINED]
            slopes = [slope.to(of.dtype) for slope, of in zip(slopes, trained, strict=True)]
            gradients = torch.autograd.grad(trained, [features, *weights, cam_weight], slopes)
            return HeadOutcome(AttentionHeadOutput(*(x.detach() for x in results)), gradients)

    def outcome(self) -> HeadOutcome:
        return self.run(True)


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
    return HeadRunner(problem.double(), reference.attention_head).outcome()


def compare_heads(outcome: HeadOutcome, expected: HeadOutcome, dtype: torch.dtype) -> Agreement:
    """All five results and all gradients; an error is a share of the largest number or of the norm, whichever is more.

    Example:
        >>> problem = make_head_problem(MapSize(2, 24, 3, 2, 2, 5), torch.float64, "contiguous", "cpu")
        >>> compare_heads(start("eager", problem).outcome(), reference_outcome(problem), torch.float64).disagrees
    """
    names = [*AttentionHeadOutput._fields, *(f"gradient of {name}" for name in _GRADIENTS)]
    kinds = ["results"] * 5 + ["map_gradient"] + ["gradients"] * (len(_GRADIENTS) - 1)
    results = zip((*outcome[0], *outcome[1]), (*expected[0], *expected[1]), strict=True)
    pairs = zip(names, kinds, results, strict=True)
    return compare_pairs((Pair(name, *both, TOLERANCES[dtype][kind]) for name, kind, both in pairs), 2, math.inf)
