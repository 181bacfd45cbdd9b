"""Ways to run the attention head on one map, each as a user of it would call it, and do they say the same."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast import _extension, functional, reference
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.types import AttentionHeadOutput, NLCBAMWeights
from dan_fast.nn import NLCBAM

# The paper in PyTorch, sample by sample and with X''; the package's own PyTorch form, as it is and compiled; kernels.
REFERENCE, EAGER, COMPILED, KERNELS = "reference", "eager", "compiled", "kernels"
CONTENDERS = (REFERENCE, EAGER, COMPILED, KERNELS)
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
    """Attributes:
    features: (B, C, H, W), the map as a ReLU leaves it.
    weights, cam_weight: in the dtype of statistics.
    labels: (B,) int64, every other one -1, as half a batch is unlabelled.
    slopes: of the loss in `attended`, `pooled` and `adversary_loss`.
    """

    size: MapSize
    features: Tensor
    weights: NLCBAMWeights
    cam_weight: Tensor
    labels: Tensor
    slopes: tuple[Tensor, Tensor, Tensor]


def make_head_problem(
    size: MapSize, dtype: torch.dtype, layout: str, device: torch.device | str, seed: int = 0
) -> HeadProblem:
    """The same map, weights and slopes for the same seed on the same device.

    Example:
        >>> make_head_problem(MapSize(2, 8, 3, 2, classes=5), torch.float32, "channels_last", "cpu").labels.shape
        torch.Size([2])
    """
    device, wide = torch.device(device), statistics_dtype(dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=wide)

    features = draw(*size[:4]).relu_().to(dtype).contiguous(memory_format=LAYOUTS[layout])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        attention = NLCBAM(size.channels, size.height * size.width, size.reduction)
    weights = NLCBAMWeights(*(w.detach().to(device, wide).requires_grad_() for w in attention.weights))
    cam_weight = (draw(size.classes, size.channels) / size.channels**0.5).requires_grad_()
    labels = torch.randint(size.classes, (size.batch,), generator=generator, device=device)
    labels[1::2] = -1
    per_channel = draw(2, size.batch, size.channels)
    slopes = (per_channel[0], per_channel[1], torch.full((size.batch,), 1 / size.batch, dtype=wide, device=device))
    return HeadProblem(size, features, weights, cam_weight, labels, slopes)


class HeadOutcome(NamedTuple):
    """Everything the head returns, and the gradients as in `_GRADIENTS`."""

    results: AttentionHeadOutput
    gradients: tuple[Tensor, ...]


class HeadRunner:
    """A contender on one problem; half-precision maps meet float32 weights under autocast, as in training.

    Args:
        problem: what to run on.
        head: `attention_head` or what was compiled of it.
        context: entered around every call.
    """

    def __init__(
        self,
        problem: HeadProblem,
        head: Callable[..., AttentionHeadOutput],
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.problem, self.head, self.context = problem, head, context

    def run(self, backward: bool) -> object:
        """Forward without autograd, or forward and all gradients; returns what a caller would hold."""
        problem, features = self.problem, self.problem.features
        with ExitStack() as stack:
            stack.enter_context(self.context())
            stack.enter_context(torch.set_grad_enabled(backward))
            if backward:
                features = features.detach().requires_grad_()
            with torch.autocast(features.device.type, features.dtype, enabled=features.dtype.itemsize < 4):
                results = self.head(features, problem.weights, problem.cam_weight, problem.labels)
            if not backward:
                return results
            trained = [getattr(results, name) for name in _TRAINED]
            slopes = [s.to(t.dtype) for s, t in zip(problem.slopes, trained, strict=True)]
            gradients = torch.autograd.grad(trained, [features, *problem.weights, problem.cam_weight], slopes)
            return HeadOutcome(AttentionHeadOutput(*(x.detach() for x in results)), gradients)

    def outcome(self) -> HeadOutcome:
        return self.run(True)


def start(name: str, problem: HeadProblem) -> HeadRunner:
    """The runner of a contender."""
    if name == KERNELS:
        return HeadRunner(problem, functional.attention_head)
    if name == REFERENCE:
        return HeadRunner(problem, _literal)
    if name == EAGER:
        return HeadRunner(problem, functional.attention_head, _extension.disabled)
    # Whatever was traced for another map would only be in the way, and is no part of the time to compile this one.
    torch.compiler.reset()
    return HeadRunner(problem, torch.compile(functional.attention_head, dynamic=False), _extension.disabled)


def _literal(x: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    with torch.autocast(x.device.type, enabled=False):
        return reference.attention_head(x.to(cam_weight.dtype), weights, cam_weight, labels)


def reference_outcome(problem: HeadProblem) -> HeadOutcome:
    """What the paper's form gives in float64 for the numbers of the problem."""
    weights = NLCBAMWeights(*(w.detach().double().requires_grad_() for w in problem.weights))
    wide = HeadProblem(
        problem.size,
        problem.features.double(),
        weights,
        problem.cam_weight.detach().double().requires_grad_(),
        problem.labels,
        tuple(slope.double() for slope in problem.slopes),
    )
    return HeadRunner(wide, reference.attention_head).outcome()


class HeadAgreement(NamedTuple):
    """Attributes:
    disagrees: what differs beyond its tolerance and by how much, None if nothing does.
    errors: of each result, the larger of the difference's shares of the largest number and of the norm.
    """

    disagrees: str | None
    errors: dict[str, float]


def compare_heads(outcome: HeadOutcome, expected: HeadOutcome, dtype: torch.dtype) -> HeadAgreement:
    """All five results and all gradients.

    Example:
        >>> problem = make_head_problem(MapSize(2, 24, 3, 2, 2, 5), torch.float64, "contiguous", "cpu")
        >>> compare_heads(start("eager", problem).outcome(), reference_outcome(problem), torch.float64).disagrees
    """
    tolerance, errors, wrong = TOLERANCES[dtype], {}, []

    def close(name: str, actual: Tensor, wanted: Tensor, limit: float) -> None:
        errors[name] = _error(actual, wanted)
        # `not <=` so that NaN is wrong.
        if not errors[name] <= limit:
            wrong.append(f"{name} by {errors[name]:.1e} (allowed {limit:.0e})")

    for name, actual, wanted in zip(AttentionHeadOutput._fields, outcome.results, expected.results, strict=True):
        close(name, actual, wanted, tolerance["results"])
    for name, actual, wanted in zip(_GRADIENTS, outcome.gradients, expected.gradients, strict=True):
        kind = "map_gradient" if name == "features" else "gradients"
        close(f"gradient of {name}", actual, wanted, tolerance[kind])
    return HeadAgreement("; ".join(wrong) or None, errors)


def _error(actual: Tensor, wanted: Tensor) -> float:
    if actual.shape != wanted.shape:
        return float("nan")
    wanted = wanted.double()
    difference = actual.double() - wanted
    tiny = torch.finfo(torch.float32).tiny
    shares = [norm(difference) / norm(wanted).clamp(min=tiny) for norm in (torch.linalg.vector_norm, _largest)]
    return float(torch.stack(shares).max())


def _largest(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, float("inf"))
