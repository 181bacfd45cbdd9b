"""Problems for the attention operators, and how their results and derivatives are compared."""

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from dan_fast import NLCBAMWeights

OPERATORS = ("nl_cbam", "attention_adversary", "attention_head")


def problem(shape=(4, 7, 3, 2), hidden=(2, 3), classes=5, dtype=torch.float64, seed=0):
    """Random (features, weights, cam_weight, labels) without ties; the second label is -1."""
    make = torch.Generator().manual_seed(seed)
    (batch, channels, height, width), (hc, hs) = shape, hidden
    reduce, expand = (hs, height * width), (height * width, hs)
    shapes = [(hc, channels), (channels, hc), reduce, reduce, expand, expand]
    features = torch.randn(shape, generator=make, dtype=torch.float64) + 0.3
    weights = [torch.randn(s, generator=make, dtype=torch.float64) for s in shapes]
    # Of a map like that of a ReLU no hidden unit is off, which would make A_S the same at all positions.
    weights[2:4] = [w.abs() for w in weights[2:4]]
    cam_weight = torch.randn(classes, channels, generator=make, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=make)
    labels[1:2] = -1
    return features.to(dtype), NLCBAMWeights(*(w.to(dtype) for w in weights)), cam_weight.to(dtype), labels


def flat_arguments(name: str, features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor):
    """Those of the named operator as `call` takes them; its leaves ask for a gradient."""
    arguments = {
        "nl_cbam": [features, *weights],
        "attention_adversary": [features, features.flip(0) * 0.3 + 0.1, cam_weight, labels],
        "attention_head": [features, *weights, cam_weight, labels],
    }[name]
    return [x.requires_grad_() if x.is_floating_point() else x for x in arguments]


def call(impl: ModuleType, name: str, features: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """The named operator as a function of a flat list of tensors."""
    if name == "nl_cbam":
        return impl.nl_cbam(features, NLCBAMWeights(*rest))
    if name == "attention_adversary":
        return impl.attention_adversary(features, *rest)
    return impl.attention_head(features, NLCBAMWeights(*rest[:6]), *rest[6:])


def floating(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.is_floating_point()]


def mixture(outputs: Iterable[Tensor]) -> Tensor:
    """A loss that weighs every entry of the outputs differently."""

    def weighed(o: Tensor) -> Tensor:
        return (torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=o.device) * o.flatten().sin()).sum()

    return sum(map(weighed, outputs))


def with_gradients(impl: ModuleType, name: str, arguments: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the named operator and the gradients of their mixture."""
    outputs = call(impl, name, *arguments)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(mixture(outputs), floating(arguments)))]


def two_derivatives(op: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, first gradients as the kernels and as PyTorch's form give them, and second gradients."""
    leaves = [a.detach().clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
    outputs, wanted = op(*leaves), floating(leaves)
    loss = mixture(outputs)
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(sum((g.sin() * (i + 1)).sum() for i, g in enumerate(first)), wanted)
    return [t.detach() for t in (*outputs, *plain, *first, *second)]


def assert_agree(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.all((a - b).abs() <= tolerance * (1 + b.abs()))
