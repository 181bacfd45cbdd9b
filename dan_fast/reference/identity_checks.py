"""Checks of what goes into the operators over one slot a person."""

import math

import torch
from torch import Tensor

from dan_fast.reference.checks import _check_device, _check_tensor


def check_identities(keys: object, labels: object, identities: object, known: object, values: bool = True) -> None:
    """Shapes, dtypes, devices and, if asked for `values`, which waits for a device, the range of the labels."""
    _check_tensor("keys", keys, ("B", "d"), None)
    _check_tensor("labels", labels, (keys.shape[0],), torch.int64)
    _check_tensor("identities", identities, ("n", keys.shape[1]), keys.dtype)
    _check_tensor("known", known, (identities.shape[0],), torch.bool)
    for name, value in (("labels", labels), ("identities", identities), ("known", known)):
        _check_device(name, value, keys.device, "keys")
    if identities.shape[0] == 0:
        raise ValueError("identities must hold at least one slot, got none")
    if values and labels.numel() and not (-1 <= int(labels.min()) and int(labels.max()) < identities.shape[0]):
        raise ValueError(
            f"labels must lie from -1 to {identities.shape[0] - 1}, one less than there are identities, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )


def check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}: at 1 nothing would be written")
