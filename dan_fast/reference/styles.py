"""Style-variant images made of others: the statistics of a map's channels are mixed with those of another image."""

import torch
from torch import Tensor

from dan_fast.core.attention_checks import check_styles
from dan_fast.reference.memory import zero_of

# Beside a variance, so that a channel without any is not divided by 0 (Zhou et al. 2021).
EPSILON = 1e-6


def mix_styles(features: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    """Give each map the channel means and deviations between its own and its partner's (MixStyle).

    Zhou, Yang, Qiao, Xiang: "Domain Generalization with MixStyle", ICLR 2021, Eqs. (4)-(6): with mean mu and deviation
    sigma of each channel over the positions, x becomes gamma (x - mu) / sigma + beta, where
    gamma = share sigma + (1 - share) sigma' and beta = share mu + (1 - share) mu', the primed ones of the partner.
    The statistics carry no gradient, as in their code.

    Args:
        features: (B, C, H, W) floating, an early map, of two positions or more.
        partners: (B,) int64, the map whose style each map takes a part of.
        share: (B,) floating, how much of its own style a map keeps; 1 leaves it as it is.

    Returns:
        (B, C, H, W), of the dtype of `features`.

    Raises:
        TypeError, ValueError: a dtype, shape, device or partner does not fit.

    Example:
        >>> maps = torch.tensor([[[[0.0, 2.0]]], [[[10.0, 14.0]]]])
        >>> mix_styles(maps, torch.tensor([1, 0]), torch.tensor([0.0, 1.0])).flatten().round(decimals=3)
        tensor([10., 14., 10., 14.])
    """
    check_styles(features, partners, share)
    mixed = []
    for x, partner, own in zip(features, partners.tolist(), share, strict=True):
        mean, deviation = _style(x)
        other_mean, other_deviation = _style(features[partner])
        gamma = own * deviation + (1 - own) * other_deviation
        beta = own * mean + (1 - own) * other_mean
        mixed.append(gamma * (x - mean) / deviation + beta)
    return torch.stack(mixed).to(features.dtype) if mixed else features + zero_of(share)


def _style(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach()
    return x.mean((1, 2), keepdim=True), (x.var((1, 2), keepdim=True) + EPSILON).sqrt()
