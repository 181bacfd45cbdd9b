"""The sets of false samples of Eq. (14), for a whole batch."""

import torch
from torch import Tensor

from dan_fast.core.checks import check_false_sample_sets
from dan_fast.functional.registration import Operator


def false_sample_sets(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The pseudo samples that look wrong beside a new one, FP and FN of Eq. (14).

    The same as `dan_fast.reference.false_sample_sets`: with n the number of slots labelled y' and T the n
    occupied slots of largest evaluation, `FP = {label = y', not in T}` and `FN = {occupied, label != y', in T}`.
    The n largest are selected, not sorted, in the order of `torch.sort`: NaN is above all, -0 equals 0, and the
    lowest slot comes first among equals.

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
    return FalseSampleSets.run(evaluation.detach(), labels, pseudo_labels)


class FalseSampleSets(Operator):
    name = "false_sample_sets"

    @staticmethod
    def form(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> tuple[Tensor, Tensor]:
        occupied = labels >= 0
        same = occupied & (labels == pseudo_labels[:, None])
        # Stable: among equal weights the lowest slot comes first.
        order = evaluation.detach().sort(dim=-1, descending=True, stable=True).indices
        # Counted along the order, and not by a weight of -inf, which an occupied slot may have too.
        taking_part = occupied[order]
        within = taking_part & (taking_part.cumsum(-1) <= same.sum(-1, keepdim=True))
        in_largest = torch.zeros_like(same).scatter(-1, order, within)
        return same & ~in_largest, occupied & ~same & in_largest

    @staticmethod
    def fake(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> tuple[Tensor, Tensor]:
        members = evaluation.new_empty(evaluation.shape, dtype=torch.bool)
        return members, torch.empty_like(members)
