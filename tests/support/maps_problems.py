"""Problems for X'' and the attention adversary of given maps, and what is true of them on every device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.head_problems import DTYPES, assert_as_close, channels_last, contiguous

ops = torch.ops.dan_fast
OPERATORS = ("head_refine", "head_refine_backward", "head_adversary", "head_adversary_backward")
# Sizes of a `Case` whose rows are several vectors long, with odd ends.
SEVERAL_VECTORS = ((2, 63, 7, 7), (1, 2048, 7, 7), (2, 40, 16, 8), (3, 130, 3, 5))


def wrong_maps(right: Tensor) -> tuple[tuple[Tensor, str], ...]:
    """Features that are refused, and the sentence."""
    return (
        (right[0], r"features must be \(B, C, H, W\), got 3 dimensions"),
        (right.int(), "features must be float64, float32, bfloat16 or float16"),
        (right[:, :0], "features must have at least one channel and one position"),
        (right[:, :, :0], "features must have at least one channel and one position"),
    )


class Results(NamedTuple):
    refined: Tensor
    grad_features: Tensor
    grad_channel_attention: Tensor
    grad_spatial_attention: Tensor
    loss: Tensor
    refined_map: Tensor
    adversary_map: Tensor
    grad_features_of_adversary: Tensor
    grad_refined_map: Tensor
    grad_rows: Tensor


class Case:
    """Random arguments of the four operators, and what their formulas make of them in a dtype.

    The second map, and the gradient of the first, lie as `other` says.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        dtype: torch.dtype,
        layout: Callable[[Tensor], Tensor] = contiguous,
        other: Callable[[Tensor], Tensor] | None = None,
    ):
        batch, channels, height, width = size
        positions = height * width
        generator = torch.Generator().manual_seed(sum(size) * 7 + channels)
        statistics = torch.float64 if dtype == torch.float64 else torch.float32

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(statistics)

        self.dtype, self.statistics, self.other = dtype, statistics, other or layout
        self.features = layout((random(*size) + 0.3).to(dtype))
        self.refined, self.grad_refined = (self.other(random(*size).to(dtype)) for _ in range(2))
        self.attentions = torch.sigmoid(random(batch, channels)), torch.sigmoid(random(batch, positions))
        self.labels = torch.arange(batch) % 3 - 1
        self.rows = random(batch, channels, scale=channels**-0.5) * (self.labels >= 0)[:, None]
        self.grads = random(batch), random(batch, positions), random(batch, positions)

    def run(self) -> Results:
        refined = ops.head_refine(self.features, *self.attentions)
        grad_refine = ops.head_refine_backward(self.features, *self.attentions, self.grad_refined)
        loss, *maps = ops.head_adversary(self.features, self.refined, self.rows, self.labels)
        grad_adversary = ops.head_adversary_backward(self.features, self.rows, self.labels, *maps, *self.grads)
        return Results(refined, *grad_refine, loss, *maps, *grad_adversary)

    def formulas(self, dtype: torch.dtype) -> Results:
        x, y, grad_y = (v.detach().to(dtype).flatten(2) for v in (self.features, self.refined, self.grad_refined))
        inputs = [v.to(dtype).requires_grad_() for v in (x, *self.attentions, self.rows.clone())]
        x, a_c, a_s, rows = inputs
        refined = x * a_c[:, :, None] * a_s[:, None, :]
        grad_refine = torch.autograd.grad((refined * grad_y).sum(), inputs[:3])
        refined_map = y.mean(dim=1).requires_grad_()
        adversary_map = (rows[:, :, None] * x).sum(dim=1)
        loss = torch.sigmoid(refined_map + adversary_map) * torch.sigmoid((refined_map - adversary_map).abs())
        known = self.labels >= 0
        results = torch.where(known, loss.sum(dim=1), 0), refined_map, torch.where(known[:, None], adversary_map, 0)
        total = sum((value * grad.to(dtype)).sum() for value, grad in zip(results, self.grads, strict=True))
        grad_x, grad_map, grad_rows = torch.autograd.grad(total, (x, refined_map, rows))
        shape = self.features.shape
        return Results(
            refined.view(shape),
            grad_refine[0].view(shape),
            *grad_refine[1:],
            *results,
            grad_x.view(shape),
            grad_map,
            grad_rows,
        )


def check(case: Case, found: Results, what: object) -> None:
    exact, pytorch = case.formulas(torch.float64), case.formulas(case.statistics)
    for name, value, *expected in zip(Results._fields, found, exact, pytorch, strict=True):
        assert_as_close(f"{name} of {what}", value, *(x.detach() for x in expected))
        is_map = value.dim() == 4
        assert value.dtype == (case.dtype if is_map else case.statistics), name
        assert value.stride() == torch.empty_like(case.features).stride() if is_map else value.is_contiguous(), name


def results() -> list[Tensor]:
    """What the kernels make of `SEVERAL_VECTORS`, in all dtypes."""
    layouts = [(dtype, layout) for dtype in DTYPES for layout in (contiguous, channels_last)]
    return [x for dtype, layout in layouts for size in SEVERAL_VECTORS for x in Case(size, dtype, layout).run()]


def arguments(case: Case) -> dict[str, list[Tensor]]:
    """Of each operator."""
    maps = ops.head_adversary(case.features, case.refined, case.rows, case.labels)[1:]
    return {
        "head_refine": [case.features, *case.attentions],
        "head_refine_backward": [case.features, *case.attentions, case.grad_refined],
        "head_adversary": [case.features, case.refined, case.rows, case.labels],
        "head_adversary_backward": [case.features, case.rows, case.labels, *maps, *case.grads],
    }
