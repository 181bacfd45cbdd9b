"""NL-CBAM and the attention adversary for a whole batch, in PyTorch: any machine, any number of derivatives.

Maps come as X (B, C, P), in the dtype of statistics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast.core.types import AttentionHeadOutput, NLCBAMWeights


def head(x: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """`attention_head` of X, Eqs. (2)-(4): attended_c = A_C,c * mean over p of X_cp A_S,p, A_at = g A_S."""
    channels, positions = x.shape[1:]
    pooled = x.mean(dim=2)
    channel_attention = channel_attention_of(x, pooled, weights)
    # One read of the map serves the channel mean of X' and the class activation map.
    rows = torch.stack([channel_attention / channels, label_rows(cam_weight, labels)], dim=1)
    g, adversary_map = (rows @ x).unbind(dim=1)
    spatial_attention = spatial_attention_of(g, channel_max(x, channel_attention), weights)
    attended = channel_attention * (x @ spatial_attention.unsqueeze(2)).squeeze(2) / positions
    loss = adversary_loss(g * spatial_attention, adversary_map, labels)
    return AttentionHeadOutput(attended, pooled, channel_attention, spatial_attention, loss)


def _bottleneck(v: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(v, reduce)), expand)


def channel_attention_of(x: Tensor, pooled: Tensor, weights: NLCBAMWeights) -> Tensor:
    """A_C (B, C) of Eq. (2) from X (B, C, P) and its spatial mean."""
    # torch.max documents that it gives the first of several maxima; amax would share the gradient among them.
    peak = x.max(dim=2).values
    return torch.sigmoid(_bottleneck(pooled, weights.wc1, weights.wc2) + _bottleneck(peak, weights.wc1, weights.wc2))


def spatial_attention_of(g: Tensor, m: Tensor, weights: NLCBAMWeights) -> Tensor:
    """A_S (B, P) of Eq. (3) from the channel mean and the channel maximum of X'."""
    a = torch.sigmoid(_bottleneck(g, weights.ws1, weights.ws2))
    b = torch.sigmoid(_bottleneck(m, weights.ws1, weights.ws2))
    c = torch.sigmoid(_bottleneck(g, weights.ws3, weights.ws4))
    s = torch.softmax(a.unsqueeze(2) * b.unsqueeze(1), dim=2)
    return (s @ c.unsqueeze(2)).squeeze(2)


def channel_max(x: Tensor, channel_attention: Tensor) -> Tensor:
    """Maximum over channels of X' (B, P), the first on ties; autograd keeps X and the indices but not X'."""
    with torch.no_grad():
        index = (x * channel_attention.unsqueeze(2)).max(dim=1).indices
    # A channel may lead at several positions; the backward of indexing adds them in a fixed order, that of
    # gather does not.
    sample = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x.gather(1, index.unsqueeze(1)).squeeze(1) * channel_attention[sample, index]


def weighted_channel_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over channels of weight (B, C) * X (B, C, P)."""
    return (weight.unsqueeze(1) @ x).squeeze(1)


def label_rows(cam_weight: Tensor, labels: Tensor) -> Tensor:
    """The classifier's row (B, C) of each label, zero for -1."""
    return torch.where((labels >= 0).unsqueeze(1), cam_weight[labels.clamp(0, cam_weight.shape[0] - 1)], 0)


def where_known(maps: Tensor, labels: Tensor) -> Tensor:
    """Maps (B, P), 0 for the label -1 whatever they hold, with a gradient of 0."""
    return torch.where((labels >= 0).unsqueeze(1), maps, 0)


def adversary_loss(refined_map: Tensor, adversary_map: Tensor, labels: Tensor) -> Tensor:
    """L_aad (B,) of Eq. (4), 0 for the label -1."""
    # Before the sigmoids too: 0 times the derivative of NaN would be NaN.
    refined_map, adversary_map = (where_known(x, labels) for x in (refined_map, adversary_map))
    loss = torch.sigmoid(refined_map + adversary_map) * torch.sigmoid((refined_map - adversary_map).abs())
    return torch.where(labels >= 0, loss.sum(dim=1), 0)
