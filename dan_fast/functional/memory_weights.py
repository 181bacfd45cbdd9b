"""Attention over slots and the sets of false samples, for a whole batch at once."""

import torch
from torch import Tensor

from dan_fast.functional.row_norms import row_sq_norms
from dan_fast.reference.checks import check_cosine_softmax, check_false_sample_sets
from dan_fast.reference.cosine import norm_from_square, occupied_softmax, statistics_dtype


def cosine_softmax(keys: Tensor, slots: Tensor, occupied: Tensor | None = None) -> Tensor:
    """Attention of keys over memory slots by cosine similarity, Eqs. (7) and (11).

    The same as `dan_fast.reference.cosine_softmax`.

    Args:
        keys: (B, d) floating.
        slots: (s, d), dtype and device of `keys`.
        occupied: (s,) bool; empty slots get weight 0. None: every slot is occupied.

    Returns:
        (B, s), float32 for half-precision keys, else the dtype of `keys`. A row is 0 if no slot is occupied.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or a key is not finite.

    Example:
        >>> cosine_softmax(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        tensor([[0.5000, 0.5000]])
    """
    check_cosine_softmax(keys, slots, occupied)
    dtype = statistics_dtype(keys.dtype)
    norms = norm_from_square(row_sq_norms(keys))[:, None] * norm_from_square(row_sq_norms(slots))
    return occupied_softmax((keys.to(dtype) @ slots.to(dtype).mT) / norms, occupied)


def false_sets(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> tuple[Tensor, Tensor]:
    """`false_sample_sets` without its checks."""
    occupied = labels >= 0
    same = occupied & (labels == pseudo_labels[:, None])
    ranking = evaluation.detach().masked_fill(~occupied, -torch.inf)
    # Stable: among equal weights the lowest slot comes first.
    order = ranking.sort(dim=-1, descending=True, stable=True).indices
    within = torch.arange(labels.numel(), device=labels.device) < same.sum(-1, keepdim=True)
    in_largest = torch.zeros_like(same).scatter(-1, order, within)
    return same & ~in_largest, occupied & ~same & in_largest


def false_sample_sets(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The pseudo samples that look wrong beside a new one, FP and FN of Eq. (14).

    The same as `dan_fast.reference.false_sample_sets`: with n the number of slots labelled y' and T the n
    slots of largest evaluation, `FP = {label = y', not in T}` and `FN = {occupied, label != y', in T}`.

    Args:
        evaluation: (B, s) floating, V: the weight of every slot for every sample.
        labels: (s,) int64, pseudo labels in the memory; -1 is an empty slot, which belongs to no set.
        pseudo_labels: (B,) int64, y' of every sample; -1 has empty sets.

    Returns:
        `(false_positive, false_negative)`, both (B, s) bool, every row against the same labels.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit.

    Example:
        >>> evaluation, labels = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([1, 0, 1])
        >>> false_sample_sets(evaluation, labels, pseudo_labels=torch.tensor([1]))
        (tensor([[False, False,  True]]), tensor([[False,  True, False]]))
    """
    check_false_sample_sets(evaluation, labels, pseudo_labels)
    return false_sets(evaluation, labels, pseudo_labels)
