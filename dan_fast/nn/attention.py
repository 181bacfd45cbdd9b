"""NL-CBAM of Sec. III-B as a module."""

import math
from numbers import Integral

import torch
from torch import Tensor, nn

from dan_fast.core.types import (
    AttentionHeadOutput,
    AttentionVariantWeights,
    NLCBAMOutput,
    NLCBAMWeights,
    attention_shapes,
)
from dan_fast.functional.attention import attention_head, attention_variant, attention_variant_head, nl_cbam

# The attentions of Fig. 6 and the weights each has: wc for channel attention, ws for the non-local spatial one,
# conv for CBAM's spatial one.
VARIANTS: dict[str, tuple[str, ...]] = {
    "nl_cbam": ("wc1", "wc2", "ws1", "ws3", "ws2", "ws4"),
    "cbam": ("wc1", "wc2", "conv"),
    "non_local": ("ws1", "ws3", "ws2", "ws4"),
    "spatial": ("conv",),
    "none": (),
}


class NLCBAM(nn.Module):
    """Channel attention, then non-local spatial attention, Eqs. (2)-(3); or a variant of Fig. 6 in its place.

    The weights are initialised as those of `nn.Linear` and `nn.Conv2d` are, uniform within 1 / sqrt(inputs) around 0;
    then each unit of a bottleneck, a row of wc1, ws1 or ws3, is given the sign that makes its sum positive. There are
    no biases.

    Args:
        channels: C of the map.
        positions: HW of the map. Non-local attention is fully connected, so it serves one map size.
        reduction: r, the bottlenecks have `max(1, size // r)` units; 1 is NL-CBAM* of Fig. 6.
        variant: "nl_cbam"; "cbam", whose spatial attention is a 7 x 7 convolution; "non_local" and "spatial",
            the spatial attentions of these two alone; or "none", without attention.

    Raises:
        ValueError: an argument below 1 or an unknown variant, or in `forward` a map that does not fit the weights.

    Example:
        >>> attention = NLCBAM(channels=24, positions=6)
        >>> attention(torch.rand(2, 24, 3, 2)).spatial_attention.shape
        torch.Size([2, 6])
    """

    def __init__(self, channels: int, positions: int, reduction: int = 12, variant: str = "nl_cbam") -> None:
        super().__init__()
        for name, value in {"channels": channels, "positions": positions, "reduction": reduction}.items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        self.channels, self.positions, self.reduction, self.variant = channels, positions, reduction, variant
        hidden_c, hidden_s = max(1, channels // reduction), max(1, positions // reduction)
        shapes = attention_shapes(channels, positions, hidden_c, hidden_s)
        for name in VARIANTS[variant]:
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name])))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for weight in self.parameters():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        # The map of a ReLU backbone is nowhere negative and no bias can lift a unit: one that starts below 0
        # would stay dead, and a map of fewer than 2r positions has one unit for A and B and one for C.
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name in ("wc1", "ws1", "ws3"):
                    weight.mul_(torch.where(weight.sum(dim=1, keepdim=True) < 0, -1, 1))

    @property
    def weights(self) -> NLCBAMWeights | AttentionVariantWeights:
        """The parameters as the operators take them."""
        kind = NLCBAMWeights if self.variant == "nl_cbam" else AttentionVariantWeights
        # As attributes, which may stand in for the parameters, as in torch.func.functional_call.
        return kind(**{name: getattr(self, name) for name in VARIANTS[self.variant]})

    def forward(self, features: Tensor) -> NLCBAMOutput:
        """(B, C, H, W) to X'' of the same shape, A_C (B, C) and A_S (B, HW); an attention left out is 1."""
        self._require_its_size(features)
        attention = nl_cbam if self.variant == "nl_cbam" else attention_variant
        return attention(features, self.weights)

    def head(self, features: Tensor, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
        """`attention_head` with this attention: all that the training loss needs from the map, see there."""
        self._require_its_size(features)
        head = attention_head if self.variant == "nl_cbam" else attention_variant_head
        return head(features, self.weights, cam_weight, labels)

    def _require_its_size(self, features: Tensor) -> None:
        if self.variant != "nl_cbam" or features.dim() != 4:
            return
        channels, height, width = features.shape[1:]
        if (channels, height * width) != (self.channels, self.positions):
            raise ValueError(
                f"features must be (B, {self.channels}, H, W) with H W = {self.positions}, got "
                f"{tuple(features.shape)}; for such maps make NLCBAM(channels={channels}, positions={height * width})"
            )

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, positions={self.positions}, reduction={self.reduction}, variant={self.variant}"
        )
