"""The attentions that Fig. 6 compares NL-CBAM with, for a whole batch, in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast.core.attention_checks import check_features, check_variant_weights
from dan_fast.core.types import AttentionHeadOutput, AttentionVariantWeights, NLCBAMOutput
from dan_fast.functional.attention.head_torch import (
    adversary_loss,
    channel_attention_of,
    channel_max,
    label_rows,
    spatial_attention_of,
    weighted_channel_sum,
)
from dan_fast.functional.attention.labels import check_cam_and_labels, marked
from dan_fast.functional.autocast import outside_autocast, widened


@outside_autocast
def attention_variant(features: Tensor, weights: AttentionVariantWeights) -> NLCBAMOutput:
    """Channel attention, then spatial attention, each only where its weights are given.

    Channel attention is that of Eq. (2). Spatial attention is that of Eq. (3), or CBAM's (Woo et al., "CBAM:
    Convolutional Block Attention Module", ECCV 2018, Eq. (3) there): the sigmoid of a 7 x 7 convolution, zeros
    around the map, over the mean and the maximum of X' over channels. An attention that is left out is 1.

    Args:
        features: (B, C, H, W) floating, the last map X of the backbone, in any memory layout.
        weights: the weights of the parts that are used, of the dtype and device of `features`.

    Returns:
        `NLCBAMOutput(refined (B, C, H, W), channel_attention (B, C), spatial_attention (B, HW))`,
        differentiable any number of times; `refined` has the layout of `features`, and the gradient of a max
        goes to its first maximum.

    Raises:
        TypeError: an argument that is not floating or whose dtype differs from that of `features`.
        ValueError: a shape or device that does not fit, or weights of half a part or of both spatial attentions.

    Example:
        >>> weights = AttentionVariantWeights(conv=torch.zeros(1, 2, 7, 7))
        >>> attention_variant(torch.ones(1, 3, 2, 2), weights).spatial_attention
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    check_features("features", features)
    check_variant_weights(weights, features)
    x = widened(features).flatten(2)
    channel_attention, _, spatial_attention = _attentions(x, features.shape[2:], weights, x.mean(dim=2))
    refined = x * channel_attention.unsqueeze(2) * spatial_attention.unsqueeze(1)
    output = (refined.unflatten(2, features.shape[2:]), channel_attention, spatial_attention)
    return NLCBAMOutput(*(value.to(features.dtype) for value in output))


@outside_autocast
def attention_variant_head(
    features: Tensor, weights: AttentionVariantWeights, cam_weight: Tensor, labels: Tensor
) -> AttentionHeadOutput:
    """`attention_head` with the attention of `attention_variant` in place of NL-CBAM; X'' is not formed.

    Args:
        features: (B, C, H, W) floating, X, in any memory layout.
        weights: the weights of the parts of the attention that are used.
        cam_weight: (c, C), the weights of the classifier.
        labels: (B,) int64, the class of each sample, -1 where it is unknown. Any other label raises on the CPU; on a
            GPU, under `torch.compile` and under `torch.vmap`, where the check would wait or is refused, its loss is
            NaN.

    Returns:
        `AttentionHeadOutput(attended (B, C), pooled (B, C), channel_attention (B, C),
        spatial_attention (B, HW), adversary_loss (B,))`.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, a device or a label that does not fit, or weights as in `attention_variant`.

    Example:
        >>> head = attention_variant_head(
        ...     torch.ones(1, 3, 2, 2), AttentionVariantWeights(), torch.ones(5, 3), torch.tensor([-1])
        ... )
        >>> head.attended
        tensor([[1., 1., 1.]])
    """
    check_features("features", features)
    check_variant_weights(weights, features)
    check_cam_and_labels(cam_weight, labels, features)
    x = widened(features).flatten(2)
    pooled = x.mean(dim=2)
    channel_attention, g, spatial_attention = _attentions(x, features.shape[2:], weights, pooled)
    attended = channel_attention * pooled
    if weights.ws1 is not None or weights.conv is not None:
        attended = channel_attention * (x @ spatial_attention.unsqueeze(2)).squeeze(2) / x.shape[2]
    adversary_map = weighted_channel_sum(x, label_rows(widened(cam_weight), labels))
    loss = marked(adversary_loss(g * spatial_attention, adversary_map, labels), labels, cam_weight)
    output = (attended, pooled, channel_attention, spatial_attention, loss)
    return AttentionHeadOutput(*(value.to(features.dtype) for value in output))


def _attentions(
    x: Tensor, map_size: torch.Size, weights: AttentionVariantWeights, pooled: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A_C (B, C), the channel mean of X' (B, P) and A_S (B, P), from X (B, C, P) and its spatial mean."""
    wide = widened(weights)
    channel_attention = torch.ones_like(pooled)
    if wide.wc1 is not None:
        channel_attention = channel_attention_of(x, pooled, wide)
    g = weighted_channel_sum(x, channel_attention) / x.shape[1]
    spatial_attention = torch.ones_like(g)
    if wide.ws1 is not None:
        spatial_attention = spatial_attention_of(g, channel_max(x, channel_attention), wide)
    elif wide.conv is not None:
        squeezed = torch.stack([g, channel_max(x, channel_attention)], dim=1).unflatten(2, map_size)
        spatial_attention = F.conv2d(squeezed, wide.conv, padding=3).sigmoid().flatten(1)
    return channel_attention, g, spatial_attention
