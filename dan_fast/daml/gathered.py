"""Gradients that are kept while graphs come and go."""

from collections.abc import Mapping

import torch
from torch import Tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors in one block of memory, with the same strides where those leave no gaps.

    Gradients come into being between activations that are freed after them. A gradient that lies alone parts the hole
    that these leave, and what a pass with tangents needs next fits into none of the parts: a heap that keeps what is
    freed grows instead.

    Args:
        tensors: name to tensor; those of each dtype and device have a block of their own. Sparse ones become dense,
            as no number with a tangent can be sparse.

    Example:
        >>> found = gathered({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        >>> found["weight"].untyped_storage().nbytes()
        32
    """
    tensors = {name: each.to_dense() if each.is_sparse else each for name, each in tensors.items()}
    copies = dict(tensors)
    for kind in {(each.dtype, each.device) for each in tensors.values()}:
        names = [name for name, each in tensors.items() if (each.dtype, each.device) == kind]
        sizes = [tensors[name].numel() for name in names]
        block = tensors[names[0]].new_empty(sum(sizes))
        for name, part in zip(names, block.split(sizes), strict=True):
            like = torch.empty_like(tensors[name], device="meta")
            copies[name] = part.as_strided(like.shape, like.stride()).copy_(tensors[name])
    return copies
