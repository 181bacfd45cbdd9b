"""Tensors on another device as they lie here, where `Tensor.to` would close the gaps between rows and channels."""

import torch
from torch import Tensor


def whole(x: Tensor) -> Tensor:
    """All numbers of the memory that a view shows a part of."""
    return x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)


def as_it_lies(x: Tensor, device: str) -> Tensor:
    """A view of the same strides, with the same numbers around it."""
    return whole(x).to(torch.device(device), copy=True).as_strided(x.shape, x.stride(), x.storage_offset())
