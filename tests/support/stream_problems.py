"""Problems for one pass over a memory, and what is true of it by the operators and by the Triton kernels.

`ops` is a namespace of the four passes: `torch.ops.dan_fast` or `dan_fast.triton_kernels`.
"""

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def padded(rows: Tensor) -> Tensor:
    """The same rows further apart, NaN between them."""
    wide = torch.full((rows.shape[0], rows.shape[1] + 3), torch.nan, dtype=rows.dtype)
    return wide[:, : rows.shape[1]].copy_(rows)


class Case:
    """A memory, its pending writes and a batch of keys, all random."""

    def __init__(self, slots: int, columns: int, queries: int, dtype: torch.dtype, pending: int | None = None):
        generator = torch.Generator().manual_seed(slots * 7 + columns + queries)
        self.dtype, self.statistics = dtype, torch.float64 if dtype == torch.float64 else torch.float32

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.statistics)

        pending = queries if pending is None else pending
        self.base = padded(random(slots, columns).to(dtype))
        self.keys, self.pending_keys = random(queries, columns), random(pending, columns)
        self.weights, self.kept = random(pending, slots), (random(slots) > -0.5).to(self.statistics)
        self.kept[3:4] = 0.75

    def writes(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.kept, self.weights, self.pending_keys

    def committed(self, dtype: torch.dtype) -> Tensor:
        """The definition, computed in `dtype`; a slot that is not kept is not read."""
        kept, weights, pending_keys = (x.to(dtype) for x in self.writes())
        return kept[:, None] * self.base.to(dtype).masked_fill(kept[:, None] == 0, 0.0) + weights.mT @ pending_keys


def assert_as_close(result: Tensor, exact: Tensor, pytorch: Tensor, terms: Tensor) -> None:
    """No more than twice PyTorch's error in the same precision; `terms` is the sum of the terms' magnitudes."""
    assert result.shape == exact.shape and torch.isfinite(result).all()
    info, error = torch.finfo(result.dtype), (result.double() - exact).abs()
    assert (error <= 4 * info.eps * (terms + info.tiny)).all()
    # In float64 the reference is no more exact than what it judges. For a single row or column PyTorch takes dot
    # products, whose many short sums err less than those of its, and of this, matrix product.
    if result.dtype != torch.float64 and min(result.shape) > 1:
        assert error.max() <= 2 * (pytorch.double() - exact).abs().max() + info.eps * exact.abs().max()


def _assert_scored(scores: Tensor, norms: Tensor, keys: Tensor, rows: Tensor) -> None:
    assert scores.dtype == norms.dtype == keys.dtype
    wide, exact = rows.to(keys.dtype), rows.double()
    assert_as_close(scores, keys.double() @ exact.mT, keys @ wide.mT, keys.double().abs() @ exact.abs().mT)
    squares = exact.square().sum(1)
    assert ((norms.double() - squares).abs() <= 4 * torch.finfo(norms.dtype).eps * squares).all()


def check_products(ops: Any, case: Case) -> tuple[Tensor, Tensor]:
    """Scores and norms, which are given back, and combinations."""
    scores, square_norms = ops.memory_scores(case.keys, case.base)
    _assert_scored(scores, square_norms, case.keys, case.base)
    combined = ops.memory_combine(case.weights, case.base)
    assert combined.dtype == case.statistics
    weights, base = case.weights.double(), case.base.double()
    pytorch = case.weights @ case.base.to(case.statistics)
    assert_as_close(combined, weights @ base, pytorch, weights.abs() @ base.abs())
    assert torch.equal(combined, ops.memory_combine(case.weights, case.base))
    return scores, square_norms


def check_commit(ops: Any, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """What is stored, its norms and scores; in place and out of place."""
    case.base[case.kept == 0] = torch.nan
    before = case.base.clone()
    stored, square_norms = ops.memory_commit(case.base, *case.writes())
    assert stored.dtype == case.dtype and stored.is_contiguous()
    assert torch.equal(case.base.nan_to_num(7.0), before.nan_to_num(7.0)), "the memory that came in is changed"
    pytorch = case.committed(case.statistics).to(case.dtype)
    terms = case.weights.double().mT.abs() @ case.pending_keys.double().abs() + case.base.double().nan_to_num(0.0).abs()
    assert_as_close(stored, case.committed(torch.float64), pytorch, terms)
    for memory in (case.base, before):
        scores, same_norms = ops.memory_commit_scores_(memory, *case.writes(), case.keys)
        assert torch.equal(memory, stored) and torch.equal(same_norms, square_norms), "in and out of place differ"
        _assert_scored(scores, square_norms, case.keys, stored)
    (slots, columns), start = case.base.shape, case.base.storage_offset()
    around = case.base.as_strided((slots, 3), case.base.stride(), start + columns)
    assert around.isnan().all(), "it wrote between the rows"
    return stored, square_norms, scores


def check_exact_products(ops: Any) -> None:
    """Every bit of a float32 key and weight counts against a bfloat16 memory."""
    odd, one = 1 + 2**-10 + 2**-23, torch.ones(1, 1)
    base = one.bfloat16()
    assert ops.memory_scores(one * odd, base)[0].item() == odd
    assert ops.memory_combine(one * odd, base).item() == odd
    # 1.0039... is halfway between two bfloat16: weights cut to 16 bits would be cut to 1.
    minus = (one * -odd).bfloat16()
    written = ops.memory_commit(minus, one[0], one * odd, one.bfloat16())[0].item()
    assert abs(written - (odd - 1)) <= 2**-8 * (odd - 1)


def check_special_values(ops: Any) -> None:
    base = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0], [torch.nan, 1.0]])
    kept, weights, key = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([[2.0, 4.0]])
    features, norms = ops.memory_commit(base, kept, weights, key)
    assert features[:2].tolist() == [[1.0, 2.0], [1.0, 2.0]] and norms[:2].tolist() == [5.0, 5.0]
    hidden = "NaN must not be hidden in a slot that is kept"
    assert str(features[2].tolist()) == "[nan, 1.0]" and norms[2].isnan(), hidden
    assert str(ops.memory_scores(key, base)[0].tolist()) == "[[nan, 10.0, nan]]"
