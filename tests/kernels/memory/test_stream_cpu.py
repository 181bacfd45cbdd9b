"""One pass over a memory on the CPU: scores and norms, the backward product, and the commit of pending writes."""

import mmap
from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from torch import Tensor

from tests.support.running import by_threads
from tests.support.stream_problems import (
    DTYPES,
    Case,
    check_commit,
    check_exact_products,
    check_products,
    check_special_values,
    padded,
)
from tests.support.toolchain import needs_extension

pytestmark = [needs_extension, pytest.mark.usefixtures("poison")]
ops = torch.ops.dan_fast

SLOTS, COLUMNS, QUERIES = (1, 5, 6, 7, 100, 301), (1, 2, 63, 2045), (0, 1, 31, 64, 65, 130)
_queries = cycle(QUERIES)
SHAPES = [(s, d, next(_queries)) for s in SLOTS for d in COLUMNS]
SHAPES += [(37, 200, t) for t in QUERIES] + [(0, 3, 4), (4, 0, 3), (0, 0, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype):
    for slots, columns, queries in SHAPES:
        case = Case(slots, columns, queries, dtype)
        assert torch.equal(check_products(ops, case)[1], ops.row_sq_norms(case.base))


@pytest.mark.parametrize("dtype", DTYPES)
def test_commits(dtype: torch.dtype):
    for slots, columns, pending in SHAPES:
        case = Case(slots, columns, 9, dtype, pending)
        stored, square_norms, scores = check_commit(ops, case)
        # What is scored is what is stored, to the bit.
        assert torch.equal(square_norms, ops.row_sq_norms(stored))
        assert torch.equal(scores, ops.memory_scores(case.keys, stored)[0])


def test_every_bit_counts_and_nan_is_not_hidden():
    check_exact_products(ops)
    check_special_values(ops)


def test_nan_and_infinity_stay_in_their_row_or_column():
    base, keys = torch.ones(14, 67), torch.ones(5, 67)
    base[5, 66], base[12, 0], keys[3, 2] = torch.nan, torch.inf, torch.nan
    scores, square_norms = ops.memory_scores(keys, base)
    clean = torch.ones(14, dtype=torch.bool)
    clean[[5, 12]] = False
    assert scores[3].isnan().all() and (scores[[0, 1, 2, 4]][:, clean] == 67).all()
    assert (square_norms[clean] == 67).all() and square_norms[5].isnan() and square_norms[12].isinf()
    combined = ops.memory_combine(torch.ones(3, 14), base)
    assert combined[:, 66].isnan().all() and combined[:, 0].isinf().all() and (combined[:, 1:66] == 14).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_is_rounded_as_pytorch_rounds(dtype: torch.dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    kept, nothing = torch.ones(1), torch.empty(0, 1)
    same, _ = ops.memory_commit(every[None], kept, nothing, torch.empty(0, every.numel()))
    assert torch.equal(same[0].nan_to_num(7.0), every.nan_to_num(7.0)) and same[0].isnan().equal(every.isnan())
    # The middle between two neighbours, a little beside it, and numbers of any magnitude.
    ladder = every[every.isfinite() & (every >= 0)].float()
    middle = ladder + torch.cat([ladder.diff() / 2, ladder.diff()[-1:] / 2])
    bits = torch.randint(-(2**31), 2**31 - 1, (40000,), generator=torch.Generator().manual_seed(0))
    numbers = torch.cat(
        [middle, middle * (1 + 2**-23), middle * (1 - 2**-23), bits.to(torch.int32).view(torch.float32)]
    )
    numbers = torch.cat([numbers, -numbers])
    base = torch.full((1, numbers.numel()), torch.nan, dtype=dtype)
    stored, _ = ops.memory_commit(base, torch.zeros(1), torch.ones(1, 1), numbers[None])
    expected = numbers.to(dtype)
    assert stored[0].isnan().equal(expected.isnan())
    assert torch.equal(stored[0].nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_have_equal_bits_wherever_they_are(dtype: torch.dtype):
    case = Case(1, 301, 67, dtype)
    base, weights = case.base.expand(100, -1).contiguous(), case.weights.expand(-1, 100).contiguous()
    scores, square_norms = ops.memory_scores(case.keys, base)
    assert (scores == scores[:, :1]).all() and (square_norms == square_norms[0]).all()
    stored, square_norms = ops.memory_commit(base, case.kept.expand(100), weights, case.pending_keys)
    assert (stored == stored[0]).all() and (square_norms == square_norms[0]).all()
    keys = case.keys[:1].expand(71, -1)
    scores, _ = ops.memory_scores(keys, base)
    assert (scores == scores[0, 0]).all()
    for part in (slice(3, 4), slice(2, 9), slice(50, 100)):
        assert torch.equal(ops.memory_scores(case.keys, base[part])[0], ops.memory_scores(case.keys, base)[0][:, part])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_bits_again_and_whatever_the_number_of_threads(dtype: torch.dtype):
    def run() -> list[Tensor]:
        case = Case(1001, 301, 65, dtype)
        found = [*ops.memory_scores(case.keys, case.base), ops.memory_combine(case.weights, case.base)]
        found += ops.memory_commit(case.base, *case.writes())
        found += ops.memory_commit_scores_(case.base, *case.writes(), case.keys)
        return [*found, case.base]

    first, *others = by_threads(run)
    assert all(all(map(torch.equal, found, first)) for found in others)


def test_any_strides():
    case = Case(40, 30, 21, torch.float32)
    plain = case.base.contiguous()

    def everything(keys: Tensor, base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor) -> list[Tensor]:
        committed = ops.memory_commit(base, kept, weights, pending_keys)
        return [*ops.memory_scores(keys, base), ops.memory_combine(weights, base), *committed]

    given = case.keys, plain, case.kept, case.weights, case.pending_keys
    expected = everything(*given)
    for view in (lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, 1)[:, ::2], padded):
        views = [view(x) if x.dim() == 2 else x.repeat_interleave(2)[::2] for x in given]
        assert all(map(torch.equal, everything(*views), expected))
    one = case.keys[:1].expand(6, -1)
    assert torch.equal(ops.memory_scores(one, plain)[0], ops.memory_scores(one.contiguous(), plain)[0])
    assert torch.equal(ops.memory_scores(one, one)[1], ops.row_sq_norms(one.contiguous()))


def test_pending_keys_in_the_type_of_storage():
    case = Case(20, 33, 5, torch.bfloat16)
    halves = case.pending_keys.bfloat16()
    same = [ops.memory_commit(case.base, case.kept, case.weights, keys) for keys in (halves, halves.float())]
    assert torch.equal(same[0][0], same[1][0]) and torch.equal(same[0][1], same[1][1])


def test_more_than_two_to_the_31_numbers():
    # Rows so far apart that a 32-bit index overflows; only their own pages are ever touched.
    stride, flags = 2**30 + 2**29 + 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * (2 * stride + 8), flags=flags)
    base = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, 8), (stride, 1))
    base.copy_(torch.arange(24).reshape(3, 8))
    keys, near = torch.eye(8)[:2] + 1, base.contiguous()
    assert torch.equal(ops.memory_scores(keys, base)[0], ops.memory_scores(keys, near)[0])
    assert torch.equal(ops.memory_combine(torch.ones(2, 3), base), ops.memory_combine(torch.ones(2, 3), near))
    writes = torch.tensor([1.0, 0.0, 1.0]), torch.ones(2, 3), keys
    scores, square_norms = ops.memory_commit_scores_(base, *writes, keys)
    stored, same_norms = ops.memory_commit(near, *writes)
    assert torch.equal(base, stored) and torch.equal(square_norms, same_norms)


KEYS, BASE, KEPT, WEIGHTS = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3), torch.ones(2, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.memory_scores(KEYS, BASE[0]), r"base must be \(s, d\), got 1 dimensions"),
        (lambda: ops.memory_scores(KEYS, BASE.int()), "base must be float64, float32, bfloat16 or float16"),
        (lambda: ops.memory_scores(KEYS[:, :3], BASE), r"keys must be \(T, d\) = \(any, 4\), got \(2, 3\)"),
        (lambda: ops.memory_scores(KEYS[0], BASE), r"keys must be \(T, d\), got 1 dimensions"),
        (lambda: ops.memory_scores(KEYS.double(), BASE), "keys must be float32"),
        (lambda: ops.memory_scores(KEYS.half(), BASE.half()), "keys must be float32"),
        (lambda: ops.memory_combine(WEIGHTS[:, :2], BASE), r"weights must be \(T, s\) = \(any, 3\), got \(2, 2\)"),
        (lambda: ops.memory_combine(WEIGHTS, BASE.double()), "weights must be float64"),
        (lambda: ops.memory_commit(BASE, KEPT[:2], WEIGHTS, KEYS), r"kept must be \(s,\) = \(3,\)"),
        (lambda: ops.memory_commit(BASE, KEPT.double(), WEIGHTS, KEYS), "kept must be float32"),
        (lambda: ops.memory_commit(BASE, KEPT, WEIGHTS.mT, KEYS), r"weights must be \(U, s\) = \(any, 3\)"),
        (lambda: ops.memory_commit(BASE, KEPT, WEIGHTS, KEYS[:1]), r"pending_keys must be \(U, d\) = \(2, 4\)"),
        (lambda: ops.memory_commit(BASE, KEPT, WEIGHTS, KEYS.half()), "pending_keys must have the dtype of base"),
        (
            lambda: ops.memory_commit_scores_(BASE[:, ::2], KEPT, WEIGHTS, KEYS[:, :2], KEYS[:, :2]),
            "base must have adjacent columns",
        ),
        (
            lambda: ops.memory_commit_scores_(BASE[:1].expand(3, 4), KEPT, WEIGHTS, KEYS, KEYS),
            "rows that do not overlap",
        ),
        (lambda: ops.memory_commit_scores_(BASE, KEPT, WEIGHTS, KEYS, KEYS[:, :1]), r"keys must be \(T, d\)"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[], object], message: str):
    with pytest.raises(RuntimeError, match=message):
        call()
    assert (BASE == 1).all()
