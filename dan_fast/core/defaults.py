"""Tensors that name neither dtype nor device, as PyTorch makes them by default, whatever the process has set."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def default_cpu() -> Iterator[None]:
    """Inside, what names no device is on the CPU; also decorates a function.

    Example:
        >>> with torch.device("meta"), default_cpu():
        ...     torch.zeros(()).device
        device(type='cpu')
    """
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def plain_defaults() -> Iterator[None]:
    """`default_cpu`, and what names no dtype is float32; the dtype for all threads of the process."""
    before = torch.get_default_dtype()
    if before == torch.float32:
        # Another thread may have set it and put back its own by the end, after which float32 would be set for good.
        with default_cpu():
            yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with default_cpu():
            yield
    finally:
        torch.set_default_dtype(before)
