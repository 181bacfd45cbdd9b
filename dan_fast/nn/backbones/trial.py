"""Trying a backbone on images of zeros, to learn the shapes that it gives."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def trial(backbone: nn.Module) -> Iterator[Tensor]:
    """Inside, a backbone is in evaluation mode without gradients; its modes and the random state are restored after.

    Yields:
        An empty tensor with the dtype and device of the backbone's first parameter.

    Example:
        >>> backbone = nn.Conv2d(3, 4, 3)
        >>> with trial(backbone) as like:
        ...     backbone(like.new_zeros(1, 3, 8, 8)).shape
        torch.Size([1, 4, 6, 6])
    """
    like = next(backbone.parameters(), torch.empty(0)).new_empty(0)
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
            yield like
    finally:
        for module, training in modes.items():
            module.training = training
