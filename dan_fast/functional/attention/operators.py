"""NL-CBAM and the attention adversary of Sec. III-B for a whole batch.

The operators keep the layout of the map: a channels_last map is read as it lies. float16 and bfloat16 are
computed in float32 and returned in their own dtype. Under autocast such arguments are taken to float32, as
autocast itself does for softmax and losses, and the results are float32; `attention_head` reads its map as it is
even then.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dan_fast.core.attention_checks import (
    check_cam,
    check_features,
    check_label_values,
    check_refined,
    check_weights,
)
from dan_fast.core.types import AdversaryOutput, AttentionHeadOutput, NLCBAMOutput, NLCBAMWeights
from dan_fast.functional.attention import head_kernels, head_torch, maps
from dan_fast.functional.attention.head_torch import (
    channel_attention_of,
    channel_max,
    label_rows,
    spatial_attention_of,
    weighted_channel_sum,
)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _outside_autocast(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run `op` with autocast off and, where it was on, with half-precision arguments in float32."""

    @wraps(op)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device_type = next((v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), "cpu")
        if not _autocasts(device_type):
            return op(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return op(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})

    return run


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


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
    wide = _widen(weights)
    if head_kernels.serves(features):
        # Without labels the head is NL-CBAM.
        no_cam = wide.wc1.new_zeros(1, features.shape[1])
        unknown = torch.full((features.shape[0],), -1, device=features.device)
        _, _, channel_attention, spatial_attention, _ = head_kernels.head(features, wide, no_cam, unknown)
    else:
        x = _widen(features).flatten(2)
        channel_attention = channel_attention_of(x, x.mean(dim=2), wide)
        g = weighted_channel_sum(x, channel_attention) / x.shape[1]
        spatial_attention = spatial_attention_of(g, channel_max(x, channel_attention), wide)
    return NLCBAMOutput(
        refined=maps.refine(features, channel_attention, spatial_attention),
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
        labels: (B,) int64, the class of each sample, -1 where it is unknown. A label that is neither raises
            on the CPU; on a GPU and under `torch.compile`, where looking would wait, its loss is NaN.

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
    _check_cam(cam_weight, labels, features)
    output = maps.adversary(features, refined, label_rows(_widen(cam_weight), labels), labels)
    output = output._replace(loss=_marked(output.loss, labels, cam_weight))
    return AdversaryOutput(*(value.to(features.dtype) for value in output))


def attention_head(features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """All that the training loss needs of the last map, Eqs. (2)-(4), without forming X''.

    attended_c = A_C,c * mean over p of X_cp A_S,p, and the channel mean of X'' is that of X' times A_S.

    Args:
        features: (B, C, H, W) floating, X, in any memory layout.
        weights: the six matrices of NL-CBAM.
        cam_weight: (c, C), the weights of the classifier.
        labels: (B,) int64, the class of each sample, -1 where it is unknown. A label that is neither raises
            on the CPU; on a GPU and under `torch.compile`, where looking would wait, its loss is NaN.

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
    if not _autocasts(features.device.type):
        return _head(features, weights, cam_weight, labels, features.dtype)
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        return _head(features, _widen(weights), _widen(cam_weight), labels, dtype)


def _head(
    features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor, dtype: torch.dtype
) -> AttentionHeadOutput:
    """Weights and results are of `dtype`, which may be wider than that of the map."""
    like = features.new_empty((), dtype=dtype).expand(features.shape)
    check_weights(weights, like)
    _check_cam(cam_weight, labels, like)
    wide = _widen(weights), _widen(cam_weight), labels
    if head_kernels.serves(features):
        output = head_kernels.head(features, *wide)
    else:
        output = head_torch.head(_widen(features).flatten(2), *wide)
    output = output._replace(adversary_loss=_marked(output.adversary_loss, labels, cam_weight))
    return AttentionHeadOutput(*(value.to(dtype) for value in output))


def _check_cam(cam_weight: Tensor, labels: Tensor, features: Tensor) -> None:
    check_cam(cam_weight, labels, features)
    if _may_look_at(labels):
        check_label_values(cam_weight, labels)


def _may_look_at(labels: Tensor) -> bool:
    """Whether reading the labels neither waits for a device nor breaks a graph."""
    return labels.device.type == "cpu" and not torch.compiler.is_compiling()


def _marked(loss: Tensor, labels: Tensor, cam_weight: Tensor) -> Tensor:
    """NaN for a label that is no class, where nobody could look at the labels."""
    if _may_look_at(labels):
        return loss
    return loss.masked_fill((labels < -1) | (labels >= cam_weight.shape[0]), torch.nan)


def _widen(value: Any) -> Any:
    """float16 and bfloat16 to float32, in a tensor or in each weight; anything else as it is."""
    if isinstance(value, NLCBAMWeights):
        return NLCBAMWeights(*map(_widen, value))
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
