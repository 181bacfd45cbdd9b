"""One pass over a memory: scores and row norms of a batch, pending writes folded in on the way.

The memories are what costs: s times d numbers, 73.6 MB for M in float32. Every function here reads them once.
Keys, weights, scores and norms are in the dtype of statistics; the memory may be stored in half precision.
"""

import torch
from torch import Tensor

from dan_fast.core.float32 import exact_float32
from dan_fast.functional.derivatives import carry_tangents
from dan_fast.functional.memory.row_norms import row_sq_norms
from dan_fast.functional.products import product
from dan_fast.functional.registration import Context, Operator, empty_like

# Rows widened or rewritten at a time in PyTorch: a piece that stays in the cache between its two or three passes.
_ROWS = 1024


def memory_scores(keys: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """`<k_t, m_i>` and `|m_i|^2`.

    Args:
        keys: (T, d), in the dtype of statistics.
        base: (s, d) floating.

    Returns:
        `(scores (T, s), square_norms (s,))`, differentiable in both arguments any number of times.
    """
    return MemoryScores.run(keys, base)


def memory_combine(weights: Tensor, base: Tensor) -> Tensor:
    """(T, d) `sum_i weights_ti m_i`, from weights (T, s): what is behind the backward of `memory_scores`."""
    return MemoryCombine.run(weights, base)


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
    return MemoryCommit.run(base, kept, weights, pending_keys)


def memory_commit_scores_(
    base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """`memory_commit` in place, with `memory_scores` of `keys` in the same pass; without gradient.

    All slots are written or none: where it raises, the version of `base` shows which.
    """
    version = base._version
    result = MemoryCommitScores.run(base, kept, weights, pending_keys, keys)
    if base._version == version:
        # Then a backward pass that still needed the old features fails instead of using the new ones. PyTorch counts
        # its own writes.
        torch.autograd.graph.increment_version(base)
    return result


def _commit_into(target: Tensor, base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor) -> None:
    # Everything is allocated before the first piece is written: `target` may be `base`, and a memory of which a part is
    # written could be neither left nor written again.
    pending_keys, cleared = pending_keys.to(kept.dtype), kept[:, None] == 0
    wide = kept.new_empty(min(_ROWS, base.shape[0]), base.shape[1])
    # Autocast leaves operators in place alone.
    with exact_float32(base.device.type):
        for at in range(0, base.shape[0], _ROWS):
            rows = slice(at, at + _ROWS)
            piece = wide[: base.shape[0] - at].copy_(base[rows]).masked_fill_(cleared[rows], 0.0)
            target[rows] = piece.addmm_(weights[:, rows].mT, pending_keys)


def _product(left: Tensor, base: Tensor, transposed: bool) -> Tensor:
    """`left @ base^T` or `left @ base`, widening a half-precision memory."""
    if base.dtype != left.dtype and not (base.requires_grad or carry_tangents((base,))):
        return _HalfProduct.apply(left, base, transposed)
    wide = base.to(left.dtype)
    return product(left, wide.mT if transposed else wide)


class _HalfProduct(torch.autograd.Function):
    """The product with a constant half-precision memory, widened piece by piece."""

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, base: Tensor, transposed: bool) -> Tensor:
        pieces = base.split(_ROWS)
        if transposed:
            return torch.cat([product(left, piece.to(left.dtype).mT) for piece in pieces], dim=1)
        parts = left.split(_ROWS, dim=1)
        return sum(product(part, piece.to(left.dtype)) for part, piece in zip(parts, pieces, strict=True))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        _, base, ctx.transposed = inputs
        ctx.save_for_backward(base)
        ctx.save_for_forward(base)

    @staticmethod
    def jvp(ctx: Context, tangent: Tensor, *_: None) -> Tensor:
        return _HalfProduct.apply(tangent, *ctx.saved_tensors, ctx.transposed)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        # Linear in `left`: the backward is the same operator turned round, hence differentiable in its turn.
        (base,) = ctx.saved_tensors
        return _HalfProduct.apply(grad, base, not ctx.transposed), None, None


class _BilinearPass(Operator):
    """A pass that is linear in the memory and in what meets it: each one's backward is the other and a product."""

    triton = True

    @staticmethod
    def setup(ctx: Context, inputs: tuple[Tensor, Tensor], output: object) -> None:
        # The memory of a step is a constant: its keys need not be kept for its gradient.
        ctx.save_for_backward(inputs[0] if ctx.needs_input_grad[1] else None, inputs[1])
        ctx.set_materialize_grads(False)


class MemoryScores(_BilinearPass):
    name = "memory_scores"

    @staticmethod
    def form(keys: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        return _product(keys, base, True), row_sq_norms(base)

    @staticmethod
    def fake(keys: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        return keys.new_empty(keys.shape[0], base.shape[0]), keys.new_empty(base.shape[0])

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, grad_norms: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        keys, base = ctx.saved_tensors
        grad_keys = grad_base = None
        if grad is not None and ctx.needs_input_grad[0]:
            grad_keys = memory_combine(grad, base)
        if ctx.needs_input_grad[1]:
            if grad is not None:
                grad_base = product(grad.mT, keys)
            if grad_norms is not None:
                from_norms = 2 * grad_norms[:, None] * base
                grad_base = from_norms if grad_base is None else grad_base + from_norms
            grad_base = None if grad_base is None else grad_base.to(base.dtype)
        return grad_keys, grad_base


class MemoryCombine(_BilinearPass):
    name = "memory_combine"

    @staticmethod
    def form(weights: Tensor, base: Tensor) -> Tensor:
        return _product(weights, base, False)

    @staticmethod
    def fake(weights: Tensor, base: Tensor) -> Tensor:
        return weights.new_empty(weights.shape[0], base.shape[1])

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        weights, base = ctx.saved_tensors
        if grad is None:
            return None, None
        grad_weights = memory_scores(grad, base)[0] if ctx.needs_input_grad[0] else None
        grad_base = product(weights.mT, grad).to(base.dtype) if ctx.needs_input_grad[1] else None
        return grad_weights, grad_base


class MemoryCommit(Operator):
    name = "memory_commit"
    triton = True

    @staticmethod
    def form(base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor) -> tuple[Tensor, Tensor]:
        features = empty_like(base)
        _commit_into(features, base, kept, weights, pending_keys)
        return features, row_sq_norms(features)

    @staticmethod
    def fake(base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor) -> tuple[Tensor, Tensor]:
        return empty_like(base), kept.new_empty(base.shape[0])


class MemoryCommitScores(Operator):
    name = "memory_commit_scores_"
    triton = True

    @staticmethod
    def form(base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        _commit_into(base, base, kept, weights, pending_keys)
        return MemoryScores.form(keys, base)

    @staticmethod
    def fake(base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return MemoryScores.fake(keys, base)
