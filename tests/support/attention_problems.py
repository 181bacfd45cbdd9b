"""Problems for the attention operators, and how their results and derivatives are compared."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dan_fast import NLCBAMWeights


def problem(shape=(4, 7, 3, 2), hidden=(2, 3), classes=5, dtype=torch.float64, seed=0):
    """Random (features, weights, cam_weight, labels) without ties; the second label is -1."""
    make = torch.Generator().manual_seed(seed)
    (batch, channels, height, width), (hc, hs) = shape, hidden
    positions = height * width
    shapes = [
        (hc, channels),
        (channels, hc),
        (hs, positions),
        (hs, positions),
        (positions, hs),
        (positions, hs),
    ]
    features = torch.randn(shape, generator=make, dtype=torch.float64) + 0.3
    weights = [torch.randn(s, generator=make, dtype=torch.float64) for s in shapes]
    # Of a map like that of a ReLU no hidden unit is off, which would make A_S the same at all positions.
    weights[2:4] = [w.abs() for w in weights[2:4]]
    cam_weight = torch.randn(classes, channels, generator=make, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=make)
    labels[1:2] = -1
    return features.to(dtype), NLCBAMWeights(*(w.to(dtype) for w in weights)), cam_weight.to(dtype), labels


def two_derivatives(op: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, first gradients and second gradients of a loss that weighs every output entry differently."""
    leaves = [a.detach().clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
    wanted = [a for a in leaves if a.requires_grad]
    outputs = op(*leaves)
    loss = sum((torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype) * o.flatten().sin()).sum() for o in outputs)
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(sum((g.sin() * (i + 1)).sum() for i, g in enumerate(first)), wanted)
    return [t.detach() for t in (*outputs, *first, *second)]


def assert_agree(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.all((a - b).abs() <= tolerance * (1 + b.abs()))
