"""One pass over a memory: scores and row norms of a batch, pending writes folded in on the way.

The memories are what costs: s times d numbers, 73.6 MB for M in float32. Every function here reads them once.
Keys, weights, scores and norms are in the dtype of statistics; the memory may be stored in half precision.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dan_fast import _extension, triton_kernels
from dan_fast.functional.memory.row_norms import row_sq_norms
from dan_fast.functional.products import product

# Rows widened or rewritten at a time in PyTorch: a piece that stays in the cache between its two or three passes.
_ROWS = 1024


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off: it would round scores to 8 bits, too coarse to tell slots apart."""
    if not torch.amp.is_autocast_available(device.type):  # of meta tensors there is none to turn off
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def memory_scores(keys: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """`<k_t, m_i>` and `|m_i|^2`.

    Args:
        keys: (T, d), in the dtype of statistics.
        base: (s, d) floating.

    Returns:
        `(scores (T, s), square_norms (s,))`, differentiable in both arguments any number of times.
    """
    if _extension.serves(base.device.type, base.device.index):
        return torch.ops.dan_fast.memory_scores.default(keys, base)
    return _scores_torch(keys, base)


def memory_combine(weights: Tensor, base: Tensor) -> Tensor:
    """(T, d) `sum_i weights_ti m_i`, from weights (T, s): what is behind the backward of `memory_scores`."""
    if _extension.serves(base.device.type, base.device.index):
        return torch.ops.dan_fast.memory_combine.default(weights, base)
    return _combine_torch(weights, base)


def memory_commit(base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor) -> tuple[Tensor, Tensor]:
    """The memory with its pending writes: `kept_i m_i + sum_u weights_ui k_u`.

    Args:
        base: (s, d) floating.
        kept: (s,) 1, or 0 where the slot was cleared, whatever it held.
        weights: (T, s).
        pending_keys: (T, d), in the dtype of `base` or of statistics.

    Returns:
        `(features (s, d) in the dtype of base, square_norms (s,))`, the norms of what is stored.
    """
    if _extension.serves(base.device.type, base.device.index):
        return torch.ops.dan_fast.memory_commit.default(base, kept, weights, pending_keys)
    return _commit_torch(base, kept, weights, pending_keys)


def memory_commit_scores_(
    base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """`memory_commit` in place, with `memory_scores` of `keys` in the same pass; without gradient."""
    if _extension.serves(base.device.type, base.device.index):
        result = torch.ops.dan_fast.memory_commit_scores_.default(base, kept, weights, pending_keys, keys)
        # Then a backward pass that still wanted the old features fails instead of using the new ones.
        torch.autograd.graph.increment_version(base)
        return result
    return _commit_scores_torch_(base, kept, weights, pending_keys, keys)


def _scores_torch(keys: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    return _product(keys, base, True), row_sq_norms(base)


def _combine_torch(weights: Tensor, base: Tensor) -> Tensor:
    return _product(weights, base, False)


def _commit_torch(base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor) -> tuple[Tensor, Tensor]:
    features = torch.empty_like(base, memory_format=torch.contiguous_format)
    _commit_into(features, base, kept, weights, pending_keys)
    return features, row_sq_norms(features)


def _commit_scores_torch_(
    base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    _commit_into(base, base, kept, weights, pending_keys)
    return _scores_torch(keys, base)


def _commit_into(target: Tensor, base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor) -> None:
    pending_keys = pending_keys.to(kept.dtype)
    for at in range(0, base.shape[0], _ROWS):
        rows = slice(at, at + _ROWS)
        piece = base[rows].to(kept.dtype).masked_fill(kept[rows, None] == 0, 0.0)
        target[rows] = product(weights[:, rows].mT, pending_keys, piece)


def _product(left: Tensor, base: Tensor, transposed: bool) -> Tensor:
    """`left @ base^T` or `left @ base`, widening a half-precision memory."""
    if base.dtype != left.dtype and not base.requires_grad:
        return _HalfProduct.apply(left, base, transposed)
    wide = base.to(left.dtype)
    return product(left, wide.mT if transposed else wide)


class _HalfProduct(torch.autograd.Function):
    """The product with a constant half-precision memory, widened piece by piece."""

    @staticmethod
    def forward(ctx, left: Tensor, base: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(base)
        ctx.transposed = transposed
        pieces = base.split(_ROWS)
        if transposed:
            return torch.cat([product(left, piece.to(left.dtype).mT) for piece in pieces], dim=1)
        parts = left.split(_ROWS, dim=1)
        return sum(product(part, piece.to(left.dtype)) for part, piece in zip(parts, pieces, strict=True))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        # Linear in `left`: the backward is the same operator turned round, hence differentiable in its turn.
        (base,) = ctx.saved_tensors
        return _HalfProduct.apply(grad, base, not ctx.transposed), None, None


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: object) -> None:
    # The memory of a step is a constant: its keys need not be kept for its gradient.
    ctx.save_for_backward(inputs[0] if ctx.needs_input_grad[1] else None, inputs[1])
    ctx.set_materialize_grads(False)


def _scores_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, grad_norms: Tensor | None) -> tuple:
    keys, base = ctx.saved_tensors
    to_keys = to_base = None
    if grad is not None and ctx.needs_input_grad[0]:
        to_keys = memory_combine(grad, base)
    if ctx.needs_input_grad[1]:
        if grad is not None:
            to_base = product(grad.mT, keys)
        if grad_norms is not None:
            by_norms = 2 * grad_norms[:, None] * base
            to_base = by_norms if to_base is None else to_base + by_norms
        to_base = None if to_base is None else to_base.to(base.dtype)
    return to_keys, to_base


def _combine_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None) -> tuple:
    weights, base = ctx.saved_tensors
    if grad is None:
        return None, None
    to_weights = memory_scores(grad, base)[0] if ctx.needs_input_grad[0] else None
    to_base = product(weights.mT, grad).to(base.dtype) if ctx.needs_input_grad[1] else None
    return to_weights, to_base


def _fake_scores(keys: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    return keys.new_empty(keys.shape[0], base.shape[0]), keys.new_empty(base.shape[0])


def _fake_commit(base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base, memory_format=torch.contiguous_format), kept.new_empty(base.shape[0])


def _serve_gpu(name: str, torch_form: Callable[..., Any]) -> None:
    """Triton does the pass on a GPU; where it cannot, PyTorch does within the same operator."""

    def on_gpu(*tensors: Tensor) -> Any:
        usable = triton_kernels.why_not(tensors[0].device.index) is None
        return (getattr(triton_kernels, name) if usable else torch_form)(*tensors)

    torch.library.impl(f"dan_fast::{name}", "CUDA")(on_gpu)


if _extension.loaded():
    _serve_gpu("memory_scores", _scores_torch)
    _serve_gpu("memory_combine", _combine_torch)
    _serve_gpu("memory_commit", _commit_torch)
    _serve_gpu("memory_commit_scores_", _commit_scores_torch_)
    torch.library.register_fake("dan_fast::memory_scores")(_fake_scores)
    torch.library.register_fake("dan_fast::memory_combine")(
        lambda weights, base: weights.new_empty(weights.shape[0], base.shape[1])
    )
    torch.library.register_fake("dan_fast::memory_commit")(_fake_commit)
    torch.library.register_fake("dan_fast::memory_commit_scores_")(
        lambda base, kept, weights, pending_keys, keys: _fake_scores(keys, base)
    )
    torch.library.register_autograd("dan_fast::memory_scores", _scores_backward, setup_context=_keep)
    torch.library.register_autograd("dan_fast::memory_combine", _combine_backward, setup_context=_keep)
