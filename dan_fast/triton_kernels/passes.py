"""One pass over a memory on the GPU: pending writes, row norms and scores, and the product of the backward pass.

Bytes. With s slots of d numbers of e bytes, `memory_scores` and `memory_combine` read s d e bytes, `memory_commit` and
`memory_commit_scores_` read and write them: 2 s d e. The rest is small: weights and scores are 4 T s bytes each (3 % of
M in float32 at T = 64, d = 2045), keys 4 T d; every program reads all the keys, but from the L2 cache.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dan_fast.core.cosine import statistics_dtype
from dan_fast.triton_kernels import products_now
from dan_fast.triton_kernels.pass_kernels import combine_pass, memory_pass

# Keys that one pass scores; more of them take further passes.
MAX_KEYS = 128
# Rows of keys or weights: the 65,535 blocks that a grid may have along an axis, of 64 rows in `memory_combine`.
MOST_ROWS = 65_535 * 64
# Programs that `memory_combine` spreads over: three for each multiprocessor of an RTX 3090, two of an H200. Not asked
# of the device, because the order of the additions, hence every bit of the result, follows from it.
_COMBINE_PROGRAMS = 256

# Block sizes. A product off the tensor cores keeps both operands of a block in registers for the whole inner
# dimension, so inner blocks are 16 wide where float32 or float64 is multiplied and 32 to 64 on the tensor cores. The
# weights of a block of slots, of up to 128 pending keys, are read once and stay on the chip. 32 slots a program: M has
# 282 of them, over three for each multiprocessor of an RTX 3090 (82), two of an H200 (132); larger blocks would read
# the keys less often but leave multiprocessors idle at the end. Eight warps where the registers of more than 64 keys
# are shared out. The variants that a training step uses do not spill on sm_86 and sm_90
# (tests/kernels/memory/test_triton_compile.py).


class Plan(NamedTuple):
    """How a kernel is launched: the block sizes and flags that it is compiled for, warps and stages."""

    constants: dict[str, Any]
    warps: int
    stages: int


def _splits(wide: torch.dtype, stored: torch.dtype) -> bool:
    return wide == torch.float32 and stored == torch.bfloat16


def _precision(wide: torch.dtype) -> str:
    return "tf32x3" if wide == torch.float32 and products_now() == "tf32x3" else "ieee"


def _tile(rows: int) -> int:
    """The least tile that holds `rows` keys: what is padded is multiplied too. The trainer's half batches have 32."""
    return next((tile for tile in (16, 32, 64) if rows <= tile), MAX_KEYS)


def plan_pass(
    stored: torch.dtype, statistics: torch.dtype, pending: int | None, pending_dtype: torch.dtype | None, steps: int
) -> Plan:
    """`memory_pass` for a memory of dtype `stored`; `pending` None: no commit, `steps` 0: no scores."""
    commits = pending is not None
    split_pending, split_keys = commits and _splits(statistics, pending_dtype), _splits(statistics, stored)
    many = max(steps, pending or 0) > 64
    tile, held_tile = _tile(steps), _tile(pending or 0)
    block_p = min(64, held_tile) if split_pending else 16
    double, to_widen = statistics == torch.float64, stored == torch.float16
    if commits:
        block_d = 32 if split_pending and not many else 16
    else:
        block_d = 16 if double or to_widen else 32
    constants = {
        "COMMIT": commits,
        "SCORES": steps > 0,
        "SPLIT_PENDING": split_pending,
        "SPLIT_KEYS": split_keys,
        "PRECISION": _precision(statistics),
        "HELD_BLOCKS": held_tile // block_p if 0 < (pending or 0) <= held_tile else 0,
        "BLOCK_P": block_p,
        "BLOCK_T": tile,
        "BLOCK_S": 16 if double and many else 32,
        "BLOCK_D": block_d,
    }
    return Plan(constants, 8 if many or double else 4, 2 if double else 3)


def plan_combine(stored: torch.dtype, statistics: torch.dtype, steps: int) -> Plan:
    """`combine_pass` for a memory of dtype `stored`."""
    split = _splits(statistics, stored)
    # float16 widened on the way takes registers in both forms: half as many columns, and a stage less, for with three
    # Triton 3.8 spills on sm_90.
    to_widen = stored == torch.float16
    block_d = 32 if to_widen else 64
    constants = {
        "SPLIT": split,
        "PRECISION": _precision(statistics),
        "BLOCK_T": min(_tile(steps), 64),
        "BLOCK_S": 32 if split else 16,
        "BLOCK_D": block_d,
    }
    return Plan(constants, 4, 2 if to_widen else 3)


def _launch(kernel: Any, grid: tuple[int, ...], plan: Plan, device: torch.device, arguments: tuple) -> None:
    # Triton launches on the current device and its current stream, whatever device the tensors are on.
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        # Without the flag Triton 3.9 warns that its default will change.
        options = {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": True}
        kernel[grid](*arguments, **plan.constants, **options)


def _run_pass(
    base: Tensor,
    target: Tensor | None,
    kept: Tensor | None,
    weights: Tensor | None,
    pending_keys: Tensor | None,
    keys: Tensor | None,
    statistics: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """Scores (None without keys) and square norms; with `target` the writes are committed into it.

    Everything is allocated before the first launch: what fails for want of memory has written nothing.
    """
    slots, steps = base.shape[0], 0 if keys is None else keys.shape[0]
    square_norms = torch.empty(slots, dtype=statistics, device=base.device)
    scores = None if keys is None else torch.empty(steps, slots, dtype=statistics, device=base.device)
    if slots == 0:
        return scores, square_norms
    if target is not None:
        kept, weights, pending_keys = kept.contiguous(), weights.contiguous(), pending_keys.contiguous()
    keys = keys.contiguous() if steps else None
    # A commit may not run twice on the same slots, so what one program cannot score takes a pass that only reads.
    steps_now = steps if target is None else min(steps, MAX_KEYS)
    now, rest = (keys[:steps_now], keys[steps_now:]) if steps else (None, None)
    # That pass adds squares in another order: the norms are those of the commit, however many keys there are.
    norms_again = torch.empty_like(square_norms) if steps > steps_now else None
    _launch_pass(base, target, kept, weights, pending_keys, now, scores, square_norms)
    if target is base:
        # Before the next launch, which may fail: by the version its caller sees that the writes have been made.
        torch.autograd.graph.increment_version(base)
    if steps > steps_now:
        _launch_pass(target, None, None, None, None, rest, scores[steps_now:], norms_again)
    return scores, square_norms


def _launch_pass(
    base: Tensor,
    target: Tensor | None,
    kept: Tensor | None,
    weights: Tensor | None,
    pending_keys: Tensor | None,
    keys: Tensor | None,
    scores: Tensor | None,
    square_norms: Tensor,
) -> None:
    """`memory_pass`; all but `base` and `target` are contiguous."""
    (slots, dim), steps = base.shape, 0 if keys is None else keys.shape[0]
    commits, statistics = target is not None, square_norms.dtype
    pending = pending_keys.shape[0] if commits else None
    plan = plan_pass(base.dtype, statistics, pending, pending_keys.dtype if commits else None, steps)
    block_s, block_t = plan.constants["BLOCK_S"], plan.constants["BLOCK_T"]
    _launch(
        memory_pass,
        (triton.cdiv(slots, block_s), max(1, triton.cdiv(steps, block_t))),
        plan,
        base.device,
        (base, target, kept, weights, pending_keys, keys, scores if steps else None, square_norms)
        + (base.stride(0), target.stride(0) if commits else 0, slots, dim, pending or 0, steps),
    )


def _with_adjacent_columns(base: Tensor) -> Tensor:
    return base if base.stride(1) == 1 or base.shape[1] <= 1 else base.contiguous()


def memory_scores(keys: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """`<k_t, m_i>` and `|m_i|^2` in one pass over the memory.

    Args:
        keys: (T, d) in the dtype of statistics: float64 for a float64 memory, else float32.
        base: (s, d) float64, float32, bfloat16 or float16; rows may lie further apart than d.

    Returns:
        `(scores (T, s), square_norms (s,))` in the dtype of keys.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device.

    Example:
        >>> keys, base = torch.randn(64, 2045, device="cuda"), torch.randn(9000, 2045, device="cuda")
        >>> memory_scores(keys, base)[0].shape
        torch.Size([64, 9000])
    """
    statistics = _check(base, keys=(keys, keys.shape[:1] + base.shape[1:]))
    return _run_pass(_with_adjacent_columns(base), None, None, None, None, keys, statistics)


def memory_combine(weights: Tensor, base: Tensor) -> Tensor:
    """(T, d) `sum_i weights_ti m_i` in one pass over the memory; the same bits each time.

    Args:
        weights: (T, s) in the dtype of statistics.
        base: (s, d), as for `memory_scores`.

    Returns:
        (T, d) in the dtype of weights.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device.

    Example:
        >>> memory_combine(torch.ones(1, 3, device="cuda"), torch.ones(3, 2, device="cuda"))
        tensor([[3., 3.]], device='cuda:0')
    """
    statistics = _check(base, weights=(weights, weights.shape[:1] + base.shape[:1]))
    (slots, dim), steps = base.shape, weights.shape[0]
    if 0 in (slots, dim, steps):
        return weights.new_zeros(steps, dim)
    base, weights = _with_adjacent_columns(base), weights.contiguous()
    plan = plan_combine(base.dtype, statistics, steps)
    block_t, block_s, block_d = (plan.constants[name] for name in ("BLOCK_T", "BLOCK_S", "BLOCK_D"))
    columns, tiles = triton.cdiv(dim, block_d), triton.cdiv(steps, block_t)
    blocks = triton.cdiv(slots, block_s)
    share = triton.cdiv(blocks, triton.cdiv(_COMBINE_PROGRAMS, columns * tiles)) * block_s
    parts = weights.new_empty(triton.cdiv(slots, share), steps, dim)
    arguments = (weights, base, parts, base.stride(0), slots, dim, steps, share)
    _launch(combine_pass, (columns, parts.shape[0], tiles), plan, base.device, arguments)
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def memory_commit(base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor) -> tuple[Tensor, Tensor]:
    """The memory with its pending writes, `kept_i m_i + sum_u weights_ui k_u`, and its row norms.

    Args:
        base: (s, d), as for `memory_scores`.
        kept: (s,) in the dtype of statistics; where it is 0, nothing of `base` remains, NaN included.
        weights: (T, s) in the dtype of statistics.
        pending_keys: (T, d) in the dtype of `base` or of statistics.

    Returns:
        `(features (s, d), square_norms (s,))`: contiguous, rounded to the dtype of base; the norms, in the dtype of
        statistics, are those of what is stored.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device.

    Example:
        >>> base, key = torch.ones(2, 3, device="cuda"), torch.ones(1, 3, device="cuda")
        >>> memory_commit(base, torch.tensor([1.0, 0.0]).cuda(), torch.tensor([[2.0, 2.0]]).cuda(), key)[1]
        tensor([27., 12.], device='cuda:0')
    """
    statistics = _check_commit(base, kept, weights, pending_keys)
    base = _with_adjacent_columns(base)
    features = torch.empty_like(base, memory_format=torch.contiguous_format)
    _, square_norms = _run_pass(base, features, kept, weights, pending_keys, None, statistics)
    return features, square_norms


def memory_commit_scores_(
    base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """`memory_commit` in place and `memory_scores` of `keys` against what is stored, in one pass (T <= 128).

    Args:
        base: (s, d) with adjacent columns; it is overwritten.
        kept, weights, pending_keys: as for `memory_commit`.
        keys: (T, d) in the dtype of statistics; T may be 0.

    Returns:
        `(scores (T, s), square_norms (s,))` in the dtype of statistics.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device, or columns that are not adjacent.

    Example:
        >>> base, key = torch.ones(2, 3, device="cuda"), torch.ones(1, 3, device="cuda")
        >>> memory_commit_scores_(base, torch.ones(2).cuda(), torch.tensor([[2.0, 0.0]]).cuda(), key, key)[0]
        tensor([[9., 3.]], device='cuda:0')
    """
    statistics = _check_commit(base, kept, weights, pending_keys, keys=(keys, keys.shape[:1] + base.shape[1:]))
    if _with_adjacent_columns(base) is not base or (base.shape[0] > 1 and base.stride(0) < base.shape[1]):
        raise ValueError(f"base must have adjacent columns and rows that do not overlap, got strides {base.stride()}")
    return _run_pass(base, base, kept, weights, pending_keys, keys, statistics)


def _check(base: Tensor, **others: tuple[Tensor, tuple[int, ...]]) -> torch.dtype:
    """The dtype of statistics; the `others` must have it and the shape beside them."""
    if base.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"base must be float64, float32, bfloat16 or float16, got {base.dtype}")
    if base.dim() != 2:
        raise ValueError(f"base must be (s, d), got {tuple(base.shape)}")
    statistics = statistics_dtype(base.dtype)
    for name, (tensor, shape) in others.items():
        if tensor.dtype != statistics and not (name == "pending_keys" and tensor.dtype == base.dtype):
            raise TypeError(f"{name} must be {statistics} for a memory in {base.dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} must be {tuple(shape)} for a memory {tuple(base.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dim() == 2 and tensor.shape[0] > MOST_ROWS:
            raise ValueError(f"{name} must have at most {MOST_ROWS:,} rows, got {tensor.shape[0]:,}; divide them")
        if tensor.device != base.device:
            raise ValueError(f"{name} must be on the memory's device {base.device}, got {tensor.device}")
    return statistics


def _check_commit(base: Tensor, kept: Tensor, weights: Tensor, pending_keys: Tensor, **keys: Any) -> torch.dtype:
    rows = pending_keys.shape[:1]
    return _check(
        base,
        kept=(kept, base.shape[:1]),
        weights=(weights, rows + base.shape[:1]),
        pending_keys=(pending_keys, rows + base.shape[1:]),
        **keys,
    )
