"""Cosine attention over memory slots: the one weighting behind W^e, W^r and V (Eqs. (7), (11))."""

import torch
from torch import Tensor

NORM_FLOOR = 1e-12
# What kernels and forms compute in; PyTorch's types of 8 bits are for storage alone.
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which cosines, weights and usage are computed for a memory of `dtype`.

    Half precision cannot rank thousands of nearly equal usages, so it is widened to float32.
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def norm_from_square(squares: Tensor) -> Tensor:
    """max(|m|, 1e-12) from |m|^2; where the floor acts, every derivative is 0 rather than NaN."""
    return squares.clamp(min=NORM_FLOOR**2).sqrt()


def on_grid(cosine: Tensor) -> Tensor:
    """Round cosines to multiples of 2^-40 (2^-22 below float64); the gradient passes unchanged.

    Parallel keys have equal cosines in exact arithmetic, but whichever way they are computed the last bits
    differ, and an argmax, a top-n set or a least-used slot would be decided by them. On the grid a tie is a
    tie, so that "lowest index first" means the same on every path. The shift is below the rounding error of
    the inner products themselves. In float32 scores that were carried through several writes err by more than a
    step: the paths may then part a tie of parallel keys in other ways.
    """
    steps = 2.0**40 if cosine.dtype == torch.float64 else 2.0**22
    values = cosine.detach()
    return cosine + ((values * steps).round() / steps - values)


def occupied_softmax(cosine: Tensor, occupied: Tensor | None) -> Tensor:
    """exp(cosine) normalised over the occupied slots of the last dimension; 0 elsewhere, all 0 if none is.

    Args:
        cosine: (..., s) floating.
        occupied: (s,) bool, or None for every slot.
    """
    if occupied is None:
        return torch.softmax(on_grid(cosine), -1)
    # A finite fill keeps a row without any occupied slot free of NaN in all derivatives.
    weights = torch.softmax(on_grid(cosine).masked_fill(~occupied, -1e30), -1)
    return weights.masked_fill(~occupied, 0.0)


def attention_weights(keys: Tensor, slots: Tensor, occupied: Tensor | None) -> Tensor:
    """`cosine_softmax` without its checks."""
    dtype = statistics_dtype(keys.dtype)
    keys, slots = keys.to(dtype), slots.to(dtype)
    key_norms = norm_from_square(keys.square().sum(-1))
    slot_norms = norm_from_square(slots.square().sum(-1))
    cosine = (keys @ slots.mT) / (key_norms[:, None] * slot_norms)
    return occupied_softmax(cosine, occupied)
