"""The attentions that Fig. 6 compares NL-CBAM with, one sample at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast.core.attention_checks import check_features, check_variant_weights
from dan_fast.core.types import AttentionHeadOutput, AttentionVariantWeights, NLCBAMOutput
from dan_fast.reference.attention import channel_attention_of, each_sample, non_local_attention_of, pool_and_correct


def attention_variant(features: Tensor, weights: AttentionVariantWeights) -> NLCBAMOutput:
    """Channel attention, then spatial attention, each only where its weights are given.

    Channel attention is that of Eq. (2). Spatial attention is that of Eq. (3), or CBAM's (Woo et al., "CBAM:
    Convolutional Block Attention Module", ECCV 2018, Eq. (3) there): the sigmoid of a 7 x 7 convolution, zeros
    around the map, over the mean and the maximum of X' over channels. An attention that is left out is 1.

    Args:
        features: (B, C, H, W) floating, the last map X of the backbone.
        weights: the weights of the parts that are used, of the dtype and device of `features`.

    Returns:
        `NLCBAMOutput(refined (B, C, H, W), channel_attention (B, C), spatial_attention (B, HW))`,
        differentiable any number of times; the gradient of a max goes to its first maximum.

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
    return each_sample(_variant_sample, features, weights)


def attention_variant_head(
    features: Tensor, weights: AttentionVariantWeights, cam_weight: Tensor, labels: Tensor
) -> AttentionHeadOutput:
    """`attention_head` with the attention of `attention_variant` in place of NL-CBAM.

    Args:
        features: (B, C, H, W) floating, X.
        weights: the weights of the parts of the attention that are used.
        cam_weight: (c, C), the weights of the classifier.
        labels: (B,) int64, the class of each sample, -1 where it is unknown.

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
    return pool_and_correct(features, attention_variant(features, weights), cam_weight, labels)


def _variant_sample(x: Tensor, weights: AttentionVariantWeights) -> tuple[Tensor, Tensor, Tensor]:
    channels, height, width = x.shape
    channel_attention = x.new_ones(channels)
    if weights.wc1 is not None:
        channel_attention = channel_attention_of(x.flatten(1), weights)
    scaled = x * channel_attention.reshape(channels, 1, 1)  # X' = X A_C
    spatial_attention = x.new_ones(height, width)
    if weights.ws1 is not None:
        spatial_attention = non_local_attention_of(scaled.flatten(1), weights).reshape(height, width)
    elif weights.conv is not None:
        spatial_attention = _convolutional_attention(scaled, weights.conv)
    return scaled * spatial_attention, channel_attention, spatial_attention.flatten()  # X'' = X' A_S


def _convolutional_attention(scaled: Tensor, conv: Tensor) -> Tensor:
    """A_S (H, W) of X' (C, H, W), CBAM's Eq. (3): sigmoid(f7x7([mean over channels; maximum over channels]))."""
    height, width = scaled.shape[1:]
    squeezed = torch.stack([scaled.mean(dim=0), scaled.max(dim=0).values])
    padded = F.pad(squeezed, (3, 3, 3, 3))
    shifts = [(row, column) for row in range(7) for column in range(7)]
    logits = sum(
        conv[0, kind, row, column] * padded[kind, row : row + height, column : column + width]
        for kind in range(2)
        for row, column in shifts
    )
    return torch.sigmoid(logits)
