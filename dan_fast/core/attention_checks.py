"""What the attention operators accept, the same for `reference` and `functional`.

Anything else is a TypeError for a wrong type or dtype, a ValueError for a wrong shape, device or value.
"""

import torch
from torch import Tensor

from dan_fast.core.checks import check_device
from dan_fast.core.cosine import FLOATING
from dan_fast.core.types import AttentionVariantWeights, NLCBAMWeights, attention_shapes


def check_features(name: str, features: Tensor) -> None:
    """A (B, C, H, W) floating map with at least one channel and one position; B may be 0."""
    _check_floating(name, features)
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise ValueError(f"{name} must be (B, C, H, W) with C, H and W at least 1, got shape {tuple(features.shape)}")


def check_weights(weights: NLCBAMWeights, features: Tensor) -> None:
    """The six matrices of NL-CBAM fit each other and the map, in shape, dtype and device."""
    if not isinstance(weights, NLCBAMWeights):
        raise TypeError(f"weights must be an NLCBAMWeights, got {type(weights).__name__}")
    _check_shapes(weights._asdict(), features)


def check_variant_weights(weights: AttentionVariantWeights, features: Tensor) -> None:
    """The weights of each part are there together, of one spatial attention at most, and fit as in `check_weights`."""
    if not isinstance(weights, AttentionVariantWeights):
        raise TypeError(f"weights must be an AttentionVariantWeights, got {type(weights).__name__}")
    present = {name for name, weight in weights._asdict().items() if weight is not None}
    for part in (("wc1", "wc2"), ("ws1", "ws3", "ws2", "ws4")):
        missing = [name for name in part if name not in present]
        if 0 < len(missing) < len(part):
            raise ValueError(f"weights must hold all of {', '.join(part)} or none, {', '.join(missing)} is missing")
    if "conv" in present and "ws1" in present:
        raise ValueError("weights must hold conv or ws1, ws3, ws2, ws4 but not both: each is a spatial attention")
    _check_shapes({name: weight for name, weight in weights._asdict().items() if weight is not None}, features)


def _check_shapes(weights: dict[str, Tensor], features: Tensor) -> None:
    channels, positions = features.shape[1], features.shape[2] * features.shape[3]
    for name, weight in weights.items():
        _check_like(f"weights.{name}", weight, features)
        if name != "conv" and (weight.ndim != 2 or 0 in weight.shape):
            raise ValueError(f"weights.{name} must be a matrix, got shape {tuple(weight.shape)}")
    hidden_c, hidden_s = (weights[name].shape[0] if name in weights else 0 for name in ("wc1", "ws1"))
    expected = attention_shapes(channels, positions, hidden_c, hidden_s)
    for name, weight in weights.items():
        if tuple(weight.shape) != expected[name]:
            raise ValueError(
                f"weights.{name} must have shape {expected[name]} to fit features of {channels} channels and "
                f"{positions} positions, got {tuple(weight.shape)}"
            )


def check_refined(refined: Tensor, features: Tensor) -> None:
    """X'' is like X, in shape, dtype and device."""
    _check_like("refined", refined, features)
    if refined.shape != features.shape:
        raise ValueError(
            f"refined must have the shape of features, got {tuple(refined.shape)} and {tuple(features.shape)}"
        )


def check_cam(cam_weight: Tensor, labels: Tensor, features: Tensor) -> None:
    """A row of `cam_weight` for each class, int64 labels, one a sample; `check_label_values` looks at their values."""
    _check_like("cam_weight", cam_weight, features)
    if cam_weight.ndim != 2 or cam_weight.shape[0] < 1 or cam_weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"cam_weight must be (c, {features.shape[1]}) with c at least 1 to fit features, "
            f"got shape {tuple(cam_weight.shape)}"
        )
    _check_int64("labels", labels)
    _check_one_each("labels", labels, features)


def check_label_values(cam_weight: Tensor, labels: Tensor) -> None:
    """A class or -1 for each sample; reading the labels makes the host wait for a GPU."""
    if labels.numel() == 0 or labels.is_meta:
        return
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low < -1 or high >= cam_weight.shape[0]:
        raise ValueError(
            f"labels must be -1 or a class in 0..{cam_weight.shape[0] - 1} (the rows of cam_weight), "
            f"got values from {low} to {high}"
        )


def check_styles(features: Tensor, partners: Tensor, share: Tensor, values: bool = True) -> None:
    """A map of several positions, and for each image an int64 partner in the batch and a floating share.

    Looking at the partners may wait for a GPU.
    """
    check_features("features", features)
    count = features.shape[0]
    if features.shape[2] * features.shape[3] < 2:
        raise ValueError("features must have two positions or more: one has no deviation, take an earlier map")
    _check_floating("share", share)
    _check_int64("partners", partners)
    _check_one_each("partners", partners, features)
    _check_one_each("share", share, features)
    if values and count and not partners.is_meta:
        low, high = torch.stack(torch.aminmax(partners)).tolist()
        if low < 0 or high >= count:
            raise ValueError(f"partners must be images 0..{count - 1}, got values from {low} to {high}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating tensor, got {got}: convert it with .float()")


def _check_int64(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {got}: convert it with .to(torch.int64)")


def _check_one_each(name: str, tensor: Tensor, features: Tensor) -> None:
    if tensor.shape != features.shape[:1]:
        raise ValueError(f"{name} must be ({features.shape[0]},), one an image, got shape {tuple(tensor.shape)}")
    check_device(name, tensor, features.device, "features")


def _check_like(name: str, tensor: Tensor, features: Tensor) -> None:
    _check_floating(name, tensor)
    if tensor.dtype != features.dtype:
        raise TypeError(f"{name} is {tensor.dtype} but features is {features.dtype}: convert one with .to()")
    check_device(name, tensor, features.device, "features")
