"""Autocast, said once for every operator: it would round what tells slots and channels apart to 8 bits."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dan_fast.core.types import AttentionVariantWeights, NLCBAMWeights

_P = ParamSpec("_P")
_R = TypeVar("_R")


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; of meta tensors there is none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off."""
    return torch.autocast(device.type, enabled=False) if autocasts(device.type) else nullcontext()


def keys_in_memory_dtype(keys: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Under autocast, keys as the network gives them are stored and compared in the dtype of the memory.

    What is no floating tensor, and keys beside slots that are none (`dtype` None), are for the checks to refuse.
    """
    if dtype is None or not isinstance(keys, Tensor) or not keys.is_floating_point():
        return keys
    return keys.to(dtype) if autocasts(keys.device.type) else keys


def widened(value: Any) -> Any:
    """float16 and bfloat16 to float32, in a tensor or in each weight of an attention; anything else as it is."""
    if isinstance(value, NLCBAMWeights | AttentionVariantWeights):
        return type(value)(*map(widened, value))
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def outside_autocast(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run an operator of `features`, its first argument, with autocast off.

    Where it was on, half-precision arguments are handed in as float32, as autocast itself does for softmax and losses.
    """

    @wraps(op)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        features = args[0] if args else kwargs.get("features")
        # What is no tensor is for the operator to refuse.
        if not isinstance(features, Tensor) or not autocasts(features.device.type):
            return op(*args, **kwargs)
        with full_precision(features.device):
            return op(*map(widened, args), **{name: widened(value) for name, value in kwargs.items()})

    return run
