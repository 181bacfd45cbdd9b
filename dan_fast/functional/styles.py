"""Style-variant images made of others, for a whole batch: two passes over a map, in PyTorch."""

import torch
from torch import Tensor

from dan_fast.core.attention_checks import check_styles
from dan_fast.core.checks import may_look_at
from dan_fast.core.cosine import statistics_dtype
from dan_fast.reference.styles import EPSILON


def mix_styles(features: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    """Give each map the channel means and deviations between its own and its partner's (MixStyle).

    Gives the same as `dan_fast.reference.mix_styles`, which has the equations, by one scale and one shift of each
    channel.

    Args:
        features: (B, C, H, W) floating, an early map, of two positions or more.
        partners: (B,) int64, the map whose style each map takes a part of. A partner out of range raises on the CPU; on
            other devices, where the check would wait for the device, indexing does what it does there.
        share: (B,) floating, how much of its own style a map keeps; 1 leaves it as it is.

    Returns:
        (B, C, H, W), of the dtype and in the memory layout of `features`; half precision is rounded once, at the end.
        The statistics carry no gradient.

    Raises:
        TypeError, ValueError: a dtype, shape, device or partner does not fit.

    Example:
        >>> maps = torch.tensor([[[[0.0, 2.0]]], [[[10.0, 14.0]]]])
        >>> mix_styles(maps, torch.tensor([1, 0]), torch.tensor([0.0, 1.0])).flatten().round(decimals=3)
        tensor([10., 14., 10., 14.])
    """
    check_styles(features, partners, share, values=may_look_at(partners))
    with torch.no_grad():
        # Detached too: tangents of forward mode pass through no_grad.
        wide = features.detach().to(statistics_dtype(features.dtype))
        variance, mean = torch.var_mean(wide, (2, 3), keepdim=True)
        deviation = (variance + EPSILON).sqrt()
    own = share.to(wide.dtype)[:, None, None, None]
    scale = own + (1 - own) * (deviation[partners] / deviation)
    shift = own * mean + (1 - own) * mean[partners] - scale * mean
    # Where a channel hardly varies the two terms cancel, so neither may be rounded to half precision.
    return (features.to(wide.dtype) * scale + shift).to(features.dtype)
