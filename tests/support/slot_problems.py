"""Problems for the attention over slots and for the sets of false samples."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.functional.memory.row_norms import row_sq_norms

F64 = torch.float64
SIZES = (0, 1, 63, 100, 1000, 9000)
KINDS = ("random", "close", "ties", "equal", "odd")  # of weights whose sets are wanted


class Weights(NamedTuple):
    """The arguments of `cosine_softmax`, and what its result is multiplied with in a loss."""

    keys: Tensor
    slots: Tensor
    occupied: Tensor | None
    factors: Tensor

    def to(self, dtype: torch.dtype) -> "Weights":
        return Weights(self.keys.to(dtype), self.slots.to(dtype), self.occupied, self.factors)


def weights(
    slots: int, batch: int = 5, dim: int = 7, fill: float | None = 0.6, seed: int = 0, zeros: bool = True
) -> Weights:
    """Random keys; among the slots some equal to a key and some of norm 0. `fill` None: no mask."""
    generator = torch.Generator().manual_seed(seed)
    keys, features, factors = (
        torch.randn(*shape, generator=generator, dtype=F64) for shape in ((batch, dim), (slots, dim), (batch, slots))
    )
    if batch:
        features[1::7] = keys[0]
        keys[batch // 2] *= 0.1
    if zeros:
        features[2::9] = 0.0
    occupied = None if fill is None else torch.rand(slots, generator=generator) < fill
    return Weights(keys, features, occupied, factors)


def operands(dtype: torch.dtype, batch: int = 4, slots: int = 33, seed: int = 0) -> tuple[Tensor, ...]:
    """What the operator `slot_softmax` takes: products, squared norms of slots and of keys, and the mask."""
    problem = weights(slots, batch, seed=seed).to(dtype)
    return problem.keys @ problem.slots.mT, row_sq_norms(problem.slots), row_sq_norms(problem.keys), problem.occupied


def literal_sets(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (14) by Python's sort, in the order of torch.sort."""
    false_positive = torch.zeros(evaluation.shape, dtype=torch.bool)
    false_negative = torch.zeros_like(false_positive)
    names = labels.tolist()
    for row, label in enumerate(pseudo_labels.tolist()):
        values = evaluation[row].double().tolist()
        occupied = [i for i, name in enumerate(names) if name >= 0]
        occupied.sort(key=lambda i: (0, 0) if math.isnan(values[i]) else (1, -values[i]))
        same = {i for i in occupied if names[i] == label}
        largest = set(occupied[: len(same)])
        for members, mask in ((same - largest, false_positive), (largest - same, false_negative)):
            mask[row, list(members)] = True
    return false_positive, false_negative


def sets(slots: int, batch: int = 6, classes: int = 5, seed: int = 0, kind: str = "random") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    evaluation = torch.rand(batch, slots, generator=generator, dtype=F64)
    match kind:
        case "close":  # as weights are
            evaluation = (evaluation * 2).exp() / 9000
        case "ties":
            evaluation = (evaluation * 3).round() / 7
        case "equal":
            evaluation = torch.full_like(evaluation, 0.25)
        case "odd":
            odd = torch.tensor(
                [math.nan, -math.nan, 0.0, -0.0, math.inf, -math.inf, -1.5, 1e-320, -1e-45, 2.0], dtype=F64
            )
            evaluation = odd[torch.randint(0, odd.numel(), (batch, slots), generator=generator)]
    labels = torch.randint(-1, classes, (slots,), generator=generator)
    pseudo_labels = torch.randint(-1, classes + 1, (batch,), generator=generator)
    return evaluation, labels, pseudo_labels


def results() -> list[Tensor]:
    """What the kernels make of problems of several vectors, in both dtypes."""
    ops, found = torch.ops.dan_fast, []
    for dtype in (F64, torch.float32):
        keys, slots, occupied, scores = weights(700).to(dtype)
        tensors = scores.to(dtype), slots.square().sum(1), keys.square().sum(1)
        result = ops.slot_softmax(*tensors, occupied)
        found += [result, *ops.slot_softmax_backward(tensors[0].sin(), result, *tensors)]
        found += ops.false_sample_sets(result, torch.arange(700) % 9 - 1, torch.arange(5))
    return found
