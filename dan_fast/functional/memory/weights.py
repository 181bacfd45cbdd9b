"""Attention over slots and the sets of false samples, for a whole batch at once.

Both are one operator each, `torch.ops.dan_fast.slot_softmax` and `torch.ops.dan_fast.false_sample_sets`, with a
PyTorch form for machines without them. Where a gradient is itself to be differentiated, the backward is the PyTorch
form's, which autograd can follow.
"""

import torch
from torch import Tensor

from dan_fast import _extension
from dan_fast.core.checks import check_cosine_softmax, check_false_sample_sets, check_keys_finite
from dan_fast.core.cosine import norm_from_square, occupied_softmax, statistics_dtype
from dan_fast.functional.derivatives import through_form
from dan_fast.functional.memory.row_norms import row_sq_norms
from dan_fast.functional.memory.stream import full_precision, memory_scores


def cosine_softmax(keys: Tensor, slots: Tensor, occupied: Tensor | None = None) -> Tensor:
    """Attention of keys over memory slots by cosine similarity, Eqs. (7) and (11).

    The same as `dan_fast.reference.cosine_softmax`, in one read of the slots; differentiable any number of times in
    keys and slots, whatever autocast says in the dtype of statistics, and traced whole by `torch.compile`.

    Args:
        keys: (B, d) floating.
        slots: (s, d), dtype and device of `keys`.
        occupied: (s,) bool; empty slots get weight 0. None: every slot is occupied.

    Returns:
        (B, s), float32 for half-precision keys, else the dtype of `keys`. A row is 0 if no slot is occupied. On a
        GPU and in a compiled function, where looking at a key would wait for the device or break the graph, the
        row of a key that is not finite, or whose squared norm is not, has weight NaN in every occupied slot.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or, on the CPU, a key is not finite.

    Example:
        >>> cosine_softmax(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        tensor([[0.5000, 0.5000]])
    """
    check_cosine_softmax(keys, slots, occupied)
    if keys.device.type == "cpu" and not torch.compiler.is_compiling():
        check_keys_finite(keys)
    with full_precision(keys.device):
        keys = keys.to(statistics_dtype(keys.dtype))
        scores, square_norms = memory_scores(keys, slots)
        return _slot_softmax(scores, square_norms, row_sq_norms(keys), occupied)


def _slot_softmax(scores: Tensor, square_norms: Tensor, key_squares: Tensor, occupied: Tensor | None) -> Tensor:
    """(B, s) weights from `<k_b, m_i>` (B, s), `|m_i|^2` (s,) and `|k_b|^2` (B,)."""
    if _extension.serves(scores.device.type, scores.device.index):
        return torch.ops.dan_fast.slot_softmax.default(scores, square_norms, key_squares, occupied)
    return _slot_softmax_torch(scores, square_norms, key_squares, occupied)


def _slot_softmax_torch(scores: Tensor, square_norms: Tensor, key_squares: Tensor, occupied: Tensor | None) -> Tensor:
    lengths = norm_from_square(key_squares).masked_fill(~key_squares.isfinite(), torch.nan)
    return occupied_softmax(scores / (lengths[:, None] * norm_from_square(square_norms)), occupied)


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
    if _extension.serves(evaluation.device.type, evaluation.device.index):
        return torch.ops.dan_fast.false_sample_sets.default(evaluation.detach(), labels, pseudo_labels)
    return false_sets(evaluation, labels, pseudo_labels)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    *arguments, occupied, weights = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return *torch.ops.dan_fast.slot_softmax_backward.default(grad, weights, *arguments), None
    return *through_form(
        lambda *tensors: (_slot_softmax_torch(*tensors, occupied),), arguments, ctx.needs_input_grad, [grad]
    ), None


def _fake_backward(grad: Tensor, weights: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments)


def _fake_sets(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> tuple[Tensor, Tensor]:
    members = evaluation.new_empty(evaluation.shape, dtype=torch.bool)
    return members, torch.empty_like(members)


if _extension.loaded():
    torch.library.register_fake("dan_fast::slot_softmax")(
        lambda scores, square_norms, key_squares, occupied: scores.new_empty(scores.shape)
    )
    torch.library.register_fake("dan_fast::slot_softmax_backward")(_fake_backward)
    torch.library.register_fake("dan_fast::false_sample_sets")(_fake_sets)
    torch.library.register_autograd("dan_fast::slot_softmax", _backward, setup_context=_keep)
