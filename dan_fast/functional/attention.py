"""NL-CBAM and the attention adversary of Sec. III-B for a whole batch.

The operators keep the layout of the map: a channels_last map is read as it lies. float16 and bfloat16 are
computed in float32 and returned in their own dtype. Under autocast such arguments are taken to float32, as
autocast itself does for softmax and losses, and the results are float32.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast.reference.attention_checks import check_cam, check_features, check_refined, check_weights
from dan_fast.reference.types import AdversaryOutput, AttentionHeadOutput, NLCBAMOutput, NLCBAMWeights

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _outside_autocast(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run `op` with autocast off and, where it was on, with half-precision arguments in float32."""

    @wraps(op)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device_type = next((v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), "cpu")
        if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
            return op(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return op(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})

    return run


@_outside_autocast
def nl_cbam(features: Tensor, weights: NLCBAMWeights) -> NLCBAMOutput:
    """Channel attention, then non-local spatial attention, Eqs. (2)-(3).

    Args:
        features: (B, C, H, W) floating, the last map X of the backbone, in any memory layout.
        weights: the six matrices, of the dtype and device of `features`.

    Returns:
        `NLCBAMOutput(refined (B, C, H, W), channel_attention (B, C), spatial_attention (B, HW))`,
        differentiable any number of times; `refined` has the layout of `features`, and the gradient of a max
        goes to its first maximum.

    Raises:
        TypeError: an argument that is not floating or whose dtype differs from that of `features`.
        ValueError: a shape or device that does not fit.

    Example:
        >>> shapes = [(1, 3), (3, 1), (1, 4), (1, 4), (4, 1), (4, 1)]
        >>> weights = NLCBAMWeights(*(torch.zeros(shape) for shape in shapes))
        >>> nl_cbam(torch.ones(1, 3, 2, 2), weights).spatial_attention
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    check_features("features", features)
    check_weights(weights, features)
    x, wide = _widen(features).flatten(2), _widen(weights)
    channel_attention = _channel_attention(x, x.mean(dim=2), wide)
    g = _weighted_channel_sum(x, channel_attention) / x.shape[1]
    spatial_attention = _spatial_attention(g, _channel_max(x, channel_attention), wide)
    refined = x * channel_attention.unsqueeze(2) * spatial_attention.unsqueeze(1)
    return NLCBAMOutput(
        refined=refined.unflatten(2, features.shape[2:]).to(features.dtype),
        channel_attention=channel_attention.to(features.dtype),
        spatial_attention=spatial_attention.to(features.dtype),
    )


@_outside_autocast
def attention_adversary(features: Tensor, refined: Tensor, cam_weight: Tensor, labels: Tensor) -> AdversaryOutput:
    """The attention adversary difference loss L_aad between A_at and the class activation map A_ad, Eq. (4).

    Args:
        features: (B, C, H, W) floating, X.
        refined: (B, C, H, W), X'' = X * A_C * A_S.
        cam_weight: (c, C), the weights of the classifier.
        labels: (B,) int64, the class of each sample, -1 where it is unknown. Checking them makes the host
            wait for a GPU.

    Returns:
        `AdversaryOutput(loss (B,), refined_map (B, HW), adversary_map (B, HW))`. Where the label is -1 the
        loss and the adversary's map are 0 and carry no gradient. The gradient of |A_at - A_ad| at 0 is 0.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, a device or a label that does not fit.

    Example:
        >>> x = torch.zeros(1, 3, 2, 2)
        >>> attention_adversary(x, x, torch.ones(5, 3), torch.tensor([4])).loss
        tensor([1.])
    """
    check_features("features", features)
    check_refined(refined, features)
    check_cam(cam_weight, labels, features)
    x = _widen(features).flatten(2)
    refined_map = _widen(refined).flatten(2).mean(dim=1)
    adversary_map = _weighted_channel_sum(x, _label_rows(_widen(cam_weight), labels))
    return AdversaryOutput(
        loss=_adversary_loss(refined_map, adversary_map, labels).to(features.dtype),
        refined_map=refined_map.to(features.dtype),
        adversary_map=adversary_map.to(features.dtype),
    )


@_outside_autocast
def attention_head(features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """All that the training loss needs of the last map, Eqs. (2)-(4), without forming X''.

    attended_c = A_C,c * mean over p of X_cp A_S,p, and the channel mean of X'' is that of X' times A_S.

    Args:
        features: (B, C, H, W) floating, X, in any memory layout.
        weights: the six matrices of NL-CBAM.
        cam_weight: (c, C), the weights of the classifier.
        labels: (B,) int64, the class of each sample, -1 where it is unknown. Checking them makes the host
            wait for a GPU.

    Returns:
        `AttentionHeadOutput(attended (B, C), pooled (B, C), channel_attention (B, C),
        spatial_attention (B, HW), adversary_loss (B,))`; attended and pooled are the spatial means of X'' and
        of X.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, a device or a label that does not fit.

    Example:
        >>> shapes = [(1, 3), (3, 1), (1, 4), (1, 4), (4, 1), (4, 1)]
        >>> weights = NLCBAMWeights(*(torch.zeros(shape) for shape in shapes))
        >>> attention_head(torch.ones(1, 3, 2, 2), weights, torch.ones(5, 3), torch.tensor([-1])).attended
        tensor([[0.2500, 0.2500, 0.2500]])
    """
    check_features("features", features)
    check_weights(weights, features)
    check_cam(cam_weight, labels, features)
    x, wide = _widen(features).flatten(2), _widen(weights)
    channels, positions = x.shape[1:]
    pooled = x.mean(dim=2)
    channel_attention = _channel_attention(x, pooled, wide)
    # One read of the map serves the channel mean of X' and the class activation map.
    rows = torch.stack([channel_attention / channels, _label_rows(_widen(cam_weight), labels)], dim=1)
    g, adversary_map = (rows @ x).unbind(dim=1)
    spatial_attention = _spatial_attention(g, _channel_max(x, channel_attention), wide)
    attended = channel_attention * (x @ spatial_attention.unsqueeze(2)).squeeze(2) / positions
    adversary_loss = _adversary_loss(g * spatial_attention, adversary_map, labels)
    output = (attended, pooled, channel_attention, spatial_attention, adversary_loss)
    return AttentionHeadOutput(*(value.to(features.dtype) for value in output))


def _widen(value: Any) -> Any:
    """float16 and bfloat16 to float32, in a tensor or in each weight; anything else as it is."""
    if isinstance(value, NLCBAMWeights):
        return NLCBAMWeights(*map(_widen, value))
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def _bottleneck(v: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(v, reduce)), expand)


def _channel_attention(x: Tensor, pooled: Tensor, weights: NLCBAMWeights) -> Tensor:
    """A_C (B, C) of Eq. (2) from X (B, C, P) and its spatial mean."""
    # torch.max documents that it gives the first of several maxima; amax would share the gradient among them.
    peak = x.max(dim=2).values
    return torch.sigmoid(_bottleneck(pooled, weights.wc1, weights.wc2) + _bottleneck(peak, weights.wc1, weights.wc2))


def _spatial_attention(g: Tensor, m: Tensor, weights: NLCBAMWeights) -> Tensor:
    """A_S (B, P) of Eq. (3) from the channel mean and the channel maximum of X'."""
    a = torch.sigmoid(_bottleneck(g, weights.ws1, weights.ws2))
    b = torch.sigmoid(_bottleneck(m, weights.ws1, weights.ws2))
    c = torch.sigmoid(_bottleneck(g, weights.ws3, weights.ws4))
    s = torch.softmax(a.unsqueeze(2) * b.unsqueeze(1), dim=2)
    return (s @ c.unsqueeze(2)).squeeze(2)


def _channel_max(x: Tensor, channel_attention: Tensor) -> Tensor:
    """Maximum over channels of X' (B, P), the first on ties; autograd keeps X and the indices but not X'."""
    with torch.no_grad():
        index = (x * channel_attention.unsqueeze(2)).max(dim=1).indices
    # A channel may lead at several positions; the backward of indexing adds them in a fixed order, that of
    # gather does not.
    sample = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x.gather(1, index.unsqueeze(1)).squeeze(1) * channel_attention[sample, index]


def _weighted_channel_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over channels of weight (B, C) * X (B, C, P)."""
    return (weight.unsqueeze(1) @ x).squeeze(1)


def _label_rows(cam_weight: Tensor, labels: Tensor) -> Tensor:
    """The classifier's row (B, C) of each label, zero for -1."""
    return cam_weight[labels.clamp(min=0)] * (labels >= 0).unsqueeze(1)


def _adversary_loss(refined_map: Tensor, adversary_map: Tensor, labels: Tensor) -> Tensor:
    """L_aad (B,) of Eq. (4), 0 for the label -1."""
    loss = torch.sigmoid(refined_map + adversary_map) * torch.sigmoid((refined_map - adversary_map).abs())
    return torch.where(labels >= 0, loss.sum(dim=1), 0)
