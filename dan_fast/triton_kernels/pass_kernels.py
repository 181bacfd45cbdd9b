"""The bodies of the Triton kernels of `passes`: a pass over a memory, and the product of its backward.

Products. A slot is told from another by the last bits of its score, so no product is rounded below float32: no TF32,
whatever `torch.backends.cuda.matmul.allow_tf32` says, and not in the gradient either, unless `float32_products` asks
for three of TF32 in place of one of float32. Still a bfloat16 memory meets
float32 keys on the tensor cores: a float32 number is the sum of three of bfloat16 and a product of two of bfloat16 is
exact in float32, so three products with float32 accumulation lose nothing. That needs no promise that the keys are
representable in bfloat16, and weights keep their 24 bits. float16 has too small a range for the split; it is widened
and multiplied in float32 as a float32 memory is.
"""

import triton
import triton.language as tl

# numpy has no bfloat16, and the interpreter's dot would multiply its bits as integers.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _tf32(x):
    """The nearest float32 of 11 bits, half away from zero. The interpreter's dot knows no TF32."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _product(wide, stored, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """wide (M, K) @ stored (K, N) in the dtype of `wide`, with Triton's "ieee" or "tf32x3" as PRECISION; SPLIT: float32
    by bfloat16 in three exact parts.

    The parts are added from the smallest and apart from any running sum, because a tensor core truncates when it
    adds: a long sum kept there would come out systematically short.
    """
    if SPLIT:
        high = wide.to(tl.bfloat16)
        rest = wide - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        if _INTERPRETED:
            low, middle, high = low.to(tl.float32), middle.to(tl.float32), high.to(tl.float32)
            stored = stored.to(tl.float32)
        total = tl.dot(low, stored)
        total = tl.dot(middle, stored, total)
        total = tl.dot(high, stored, total)
    elif _INTERPRETED and PRECISION == "tf32x3":
        stored = stored.to(wide.dtype)
        wide_high, stored_high = _tf32(wide), _tf32(stored)
        wide_low, stored_low = _tf32(wide - wide_high), _tf32(stored - stored_high)
        low = tl.dot(wide_high, stored_low, tl.dot(wide_low, stored_high))
        # Of infinity there is no rest.
        total = tl.dot(wide_high, stored_high, tl.where(low == low, low, 0.0))
    else:
        total = tl.dot(wide, stored.to(wide.dtype), input_precision=PRECISION, out_dtype=wide.dtype)
    return total


@triton.jit
def _columns(base, slot, live, stride, column, dim):
    """(slots, columns) of the memory; 0 beyond its ends."""
    mask = live[:, None] & (column < dim)[None, :]
    return tl.load(base + slot.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _rows(matrix, start, rows, column, dim, BLOCK: tl.constexpr):
    """(BLOCK, columns) of a matrix (rows, dim) from row `start`; 0 beyond its ends."""
    row = start + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < dim)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * dim + column[None, :], mask=mask, other=0.0)


@triton.jit
def _shares(weights, start, pending, first, slots, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr):
    """(BLOCK_S, BLOCK_P) of weights (pending, slots), transposed, from slot `first` and pending key `start`."""
    u = start + tl.arange(0, BLOCK_P)
    slot = first + tl.arange(0, BLOCK_S)
    mask = (u < pending)[None, :] & (slot < slots)[:, None]
    return tl.load(weights + u.to(tl.int64)[None, :] * slots + slot[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["slots", "pending", "steps"])
def memory_pass(
    base,
    target,
    kept,
    weights,
    pending_keys,
    keys,
    scores,
    square_norms,
    base_stride,
    target_stride,
    slots,
    dim,
    pending,
    steps,
    COMMIT: tl.constexpr,
    SCORES: tl.constexpr,
    SPLIT_PENDING: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns BLOCK_S slots and walks their columns; axis 1 of the grid, if any, takes further keys."""
    stat: tl.constexpr = square_norms.dtype.element_ty
    # A matrix may have more than 2^31 elements, and so may lie between two rows of a block.
    first = tl.program_id(0).to(tl.int64) * BLOCK_S
    within = tl.arange(0, BLOCK_S)
    live = within < slots - first
    step = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    offsets = tl.arange(0, BLOCK_D)
    base += first * base_stride
    squares = tl.zeros((BLOCK_S, BLOCK_D), stat)
    if COMMIT:
        target += first * target_stride
        keep = tl.load(kept + first + within, mask=live, other=0.0)[:, None]
        shares = ()
        for block in tl.static_range(HELD_BLOCKS):
            shares = shares + (_shares(weights, block * BLOCK_P, pending, first, slots, BLOCK_P, BLOCK_S),)
    if SCORES:
        total = tl.zeros((BLOCK_T, BLOCK_S), stat)
    if COMMIT:
        # Triton fetches ahead what goes straight into a product; the base of a commit does not.
        ahead = _columns(base, within, live, base_stride, offsets, dim)
    for start in range(0, dim, BLOCK_D):
        column = start + offsets
        if COMMIT:
            slot = ahead
            ahead = _columns(base, within, live, base_stride, column + BLOCK_D, dim)
        else:
            slot = _columns(base, within, live, base_stride, column, dim)
        if COMMIT:
            # A cleared slot holds only what was written since, whatever was there: 0 * NaN would stay.
            new = tl.where(keep == 0, 0.0, keep * slot.to(stat))
            for block in tl.static_range(HELD_BLOCKS):
                key = _rows(pending_keys, block * BLOCK_P, pending, column, dim, BLOCK_P)
                new += _product(shares[block], key, SPLIT_PENDING, PRECISION)
            if HELD_BLOCKS == 0:
                for u in range(0, pending, BLOCK_P):
                    share = _shares(weights, u, pending, first, slots, BLOCK_P, BLOCK_S)
                    new += _product(
                        share, _rows(pending_keys, u, pending, column, dim, BLOCK_P), SPLIT_PENDING, PRECISION
                    )
            slot = new.to(slot.dtype)
            here = live[:, None] & (column < dim)[None, :]
            tl.store(target + within.to(tl.int64)[:, None] * target_stride + column[None, :], slot, mask=here)
        wide = slot.to(stat)
        squares += wide * wide
        if SCORES:
            key = _rows(keys, tl.program_id(1) * BLOCK_T, steps, column, dim, BLOCK_T)
            total += _product(key, tl.trans(slot), SPLIT_KEYS, PRECISION)
    if tl.program_id(1) == 0:
        tl.store(square_norms + first + within, tl.sum(squares, 1), mask=live)
    if SCORES:
        at = step[:, None].to(tl.int64) * slots + (first + within)[None, :]
        tl.store(scores + at, total, mask=(step < steps)[:, None] & live[None, :])


@triton.jit(do_not_specialize=["slots", "steps", "share"])
def combine_pass(
    weights,
    base,
    parts,
    base_stride,
    slots,
    dim,
    steps,
    share,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns BLOCK_D columns and BLOCK_T rows of the result and adds `share` slots, in their order."""
    stat: tl.constexpr = parts.dtype.element_ty
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < dim
    part = tl.program_id(1).to(tl.int64)
    step = (tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    wanted = (step < steps)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_D), stat)
    first = part * share
    for start in range(0, share, BLOCK_S):
        row = first + start + tl.arange(0, BLOCK_S)
        live = row < slots
        slot = tl.load(
            base + row[:, None] * base_stride + column[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        weight = tl.load(weights + step[:, None] * slots + row[None, :], mask=wanted & live[None, :], other=0.0)
        total += _product(weight, slot, SPLIT, PRECISION)
    tl.store(parts + (part * steps + step[:, None]) * dim + column[None, :], total, mask=wanted & inside[None, :])
