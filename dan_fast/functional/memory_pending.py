"""A memory whose writes wait: `features = kept * base + weights^T keys`, formed only when someone looks.

A batch needs of the memory only its scores against the keys and its row norms. Both follow from the base and
the pending writes, so that a step reads the base once and writes nothing; many steps share one write.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dan_fast.functional.row_norms import row_sq_norms
from dan_fast.reference.cosine import statistics_dtype
from dan_fast.reference.types import MemoryState

# Pending writes cost a (T, s) matrix and a product of that size a step; beyond this many one pass over the
# memory is cheaper, and float32 row norms have gone through enough additions.
MAX_PENDING = 128

# Rows widened or rewritten at a time: a piece that stays in the cache between its two or three passes.
_ROWS = 1024


class _ProductWithMemory(torch.autograd.Function):
    """`left @ memory` or `left @ memory^T` for a constant half-precision memory, widened piece by piece."""

    @staticmethod
    def forward(ctx, left: Tensor, memory: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(memory)
        ctx.transposed = transposed
        pieces = memory.split(_ROWS)
        if transposed:
            return torch.cat([left @ piece.to(left.dtype).mT for piece in pieces], dim=1)
        parts = left.split(_ROWS, dim=1)
        return sum(part @ piece.to(left.dtype) for part, piece in zip(parts, pieces, strict=True))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        # Linear in `left`: the backward is the same operator turned round, hence differentiable in its turn.
        (memory,) = ctx.saved_tensors
        return _ProductWithMemory.apply(grad, memory, not ctx.transposed), None, None


@dataclass
class PendingMemory:
    """A `MemoryState` with writes that have not reached its features yet. No tensor in it carries a gradient.

    Tensors are never changed in place: backward passes of earlier steps still read `base`.

    Attributes:
        base: (s, d) the features before the pending writes.
        kept: (s,) 1, or 0 where a pending write has cleared the slot; None when nothing is pending.
        weights: (T, s) what slot i holds of pending key t; None when nothing is pending.
        keys: (T, d) the pending keys; None when nothing is pending.
        square_norms: (s,) |m_i|^2 with the pending writes; None: not computed yet.
        usage, evaluation, labels, least_used, sample_ids: as in `MemoryState`, always up to date.
    """

    base: Tensor
    labels: Tensor
    usage: Tensor
    evaluation: Tensor
    least_used: Tensor
    sample_ids: Tensor
    kept: Tensor | None = None
    weights: Tensor | None = None
    keys: Tensor | None = None
    square_norms: Tensor | None = None

    @classmethod
    def of(cls, state: MemoryState) -> "PendingMemory":
        state = MemoryState(*(x.detach() for x in state))
        return cls(state.features, *state[1:])

    @property
    def dtype(self) -> torch.dtype:
        return statistics_dtype(self.base.dtype)

    @property
    def pending(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0]

    def scores(self, keys: Tensor) -> Tensor:
        """<k_b, m_i> as (B, s), with the gradient to `keys` ((B, d), in the dtype of statistics)."""
        if self.base.dtype == self.dtype:
            scores = keys @ self.base.mT
        else:
            scores = _ProductWithMemory.apply(keys, self.base, True)
        if self.pending:
            scores = torch.addmm(scores * self.kept, keys @ self.keys.to(self.dtype).mT, self.weights)
        return scores

    def norms(self) -> Tensor:
        """(s,) |m_i|^2."""
        if self.square_norms is None:
            self.square_norms = row_sq_norms(self.base)
        return self.square_norms

    def settle(self) -> MemoryState:
        """Write what is pending into a new `base`; the old one is left to whoever still reads it."""
        if self.pending:
            new = torch.empty_like(self.base)
            for at in range(0, new.shape[0], _ROWS):
                rows = slice(at, at + _ROWS)
                piece = self.base[rows].to(self.dtype) * self.kept[rows, None]
                new[rows] = piece.addmm_(self.weights[:, rows].mT, self.keys.to(self.dtype))
            self.base, self.kept, self.weights, self.keys = new, None, None, None
        # Recomputed from what is stored, so that a memory restored from a file goes on bit for bit.
        self.square_norms = None
        return self.unsettled()

    def unsettled(self) -> MemoryState:
        """Everything up to date except the features, which are those of `base`."""
        return MemoryState(self.base, self.labels, self.usage, self.evaluation, self.least_used, self.sample_ids)

    def after(self, kept: Tensor, weights: Tensor, keys: Tensor, **up_to_date: Tensor) -> "PendingMemory":
        """The memory after a further batch: `kept` (s,) and `weights` (T, s) of it, `keys` (T, d)."""
        if self.pending:
            weights = torch.cat([self.weights * kept, weights])
            keys = torch.cat([self.keys, keys])
            kept = self.kept * kept
        return replace(self, kept=kept, weights=weights, keys=keys, **up_to_date)
