"""NL-CBAM of Sec. III-B as a module."""

import math

import torch
from torch import Tensor, nn

from dan_fast.functional.attention import nl_cbam
from dan_fast.reference.types import NLCBAMOutput, NLCBAMWeights


class NLCBAM(nn.Module):
    """Channel attention, then non-local spatial attention, Eqs. (2)-(3).

    The weights `wc1, wc2, ws1, ws3, ws2, ws4` start as `nn.Linear` starts its own, uniform within
    1 / sqrt(inputs) around 0; then each unit of a bottleneck, a row of wc1, ws1 or ws3, takes the sign that
    makes its sum positive. There are no biases.

    Args:
        channels: C of the map.
        positions: HW of the map. Spatial attention is fully connected, so it serves one map size.
        reduction: r, the bottlenecks have `max(1, size // r)` units.

    Raises:
        ValueError: an argument below 1, or in `forward` a map that does not fit.

    Example:
        >>> attention = NLCBAM(channels=24, positions=6)
        >>> attention(torch.rand(2, 24, 3, 2)).spatial_attention.shape
        torch.Size([2, 6])
    """

    def __init__(self, channels: int, positions: int, reduction: int = 12) -> None:
        super().__init__()
        for name, value in {"channels": channels, "positions": positions, "reduction": reduction}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.channels, self.positions, self.reduction = channels, positions, reduction
        hidden_c, hidden_s = max(1, channels // reduction), max(1, positions // reduction)
        self.wc1 = nn.Parameter(torch.empty(hidden_c, channels))
        self.wc2 = nn.Parameter(torch.empty(channels, hidden_c))
        self.ws1 = nn.Parameter(torch.empty(hidden_s, positions))
        self.ws3 = nn.Parameter(torch.empty(hidden_s, positions))
        self.ws2 = nn.Parameter(torch.empty(positions, hidden_s))
        self.ws4 = nn.Parameter(torch.empty(positions, hidden_s))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for weight in self.weights:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        # The map of a ReLU backbone is nowhere negative and no bias can lift a unit: one that starts below 0
        # would be dead for good, and a map of fewer than 2r positions has one unit for A and B and one for C.
        with torch.no_grad():
            for weight in (self.wc1, self.ws1, self.ws3):
                weight.mul_(torch.where(weight.sum(dim=1, keepdim=True) < 0, -1, 1))

    @property
    def weights(self) -> NLCBAMWeights:
        """The parameters as the operators take them."""
        return NLCBAMWeights(self.wc1, self.wc2, self.ws1, self.ws3, self.ws2, self.ws4)

    def forward(self, features: Tensor) -> NLCBAMOutput:
        """(B, C, H, W) to X'' of the same shape, A_C (B, C) and A_S (B, HW)."""
        return nl_cbam(features, self.weights)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, positions={self.positions}, reduction={self.reduction}"
