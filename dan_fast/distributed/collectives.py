"""Collectives with derivatives of every order: each operation beside its adjoint.

A tensor is *whole* where every rank holds the same values, which count once, or *own* where each rank holds a part of
one thing or a summand of it. What is differentiated is a whole loss, or the sum of the ranks' own losses; the gradient
in a whole tensor is whole, the gradient in an own tensor is that of its part. Hence two adjoint pairs:

    all_gather: own parts -> whole          own_part: whole -> own part, without communication
    all_reduce: own summands -> whole       hand_out: whole -> what each rank computes its own with, the identity

Each is the other's backward, so that no factor of the number of ranks comes in anywhere. A backward pass that meets
`hand_out` or `own_part` communicates: all ranks have to run it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.nn.functional import pad

ProcessGroup = distributed.ProcessGroup
# Bytes to a multiple of which tensors are filled up where they travel together: every dtype may then be read in place.
_ALIGNMENT = 16
# By the name that PyTorch gives it from 2.14 on, where there is one: the older warns.
_gather_flat = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)


def all_gather(group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors of all ranks, in one collective.

    Args:
        group: of N ranks.
        tensors: of any dtypes, on one device; of equal shapes and dtypes on all ranks.

    Returns:
        (N, ...) for each of `tensors`, whole; floating ones with a gradient, which is a rank's own part of it.
    """
    return _AllGather.apply(group, *tensors)


def hand_out(group: ProcessGroup, tensor: Tensor) -> Tensor:
    """`tensor`, whole, for what each rank computes of its own with it; backward, the gradients are added up."""
    return _HandOut.apply(group, tensor)


def gather_parts(
    group: ProcessGroup, tensors: Sequence[Tensor], sizes: Sequence[Sequence[int]], dim: int
) -> list[Tensor]:
    """`all_gather` of parts of unequal length, concatenated in the order of the ranks.

    Args:
        group: of N ranks.
        tensors: as for `all_gather`, but for their size in `dim`.
        sizes: for each tensor, how long the part of each of the N ranks is.
        dim: along which parts are concatenated, 0 or -1.

    Returns:
        One whole tensor for each of `tensors`.
    """
    filled = []
    for tensor, lengths in zip(tensors, sizes, strict=True):
        missing = max(lengths) - tensor.shape[dim]
        before_dim = 0 if dim == -1 else tensor.dim() - 1
        filled.append(pad(tensor, (0, 0) * before_dim + (0, missing)) if missing else tensor)
    stacked = all_gather(group, *filled)
    return [
        torch.cat([part.narrow(dim, 0, length) for part, length in zip(parts.unbind(), lengths, strict=True)], dim)
        for parts, lengths in zip(stacked, sizes, strict=True)
    ]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        gathered = _gathered(group, tensors)
        ctx.mark_non_differentiable(*(x for x in gathered if not x.is_floating_point()))
        return gathered

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        floating = [grad for grad in grads if grad.is_floating_point()]
        own = iter(_OwnPart.apply(ctx.group, *floating))
        return None, *(next(own) if grad.is_floating_point() else None for grad in grads)


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: ProcessGroup, *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(whole[group.rank()].clone() for whole in wholes)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_AllGather.apply(ctx.group, *grads)


class _HandOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, _AllReduce.apply(ctx.group, grad)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, _HandOut.apply(ctx.group, grad)


def _gathered(group: ProcessGroup, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As bytes, so that one collective carries all dtypes and every backend knows them."""
    lengths = [x.numel() * x.element_size() for x in tensors]
    pieces = [_bytes_of(x) for x in tensors if x.numel()]
    own = torch.cat(pieces) if pieces else tensors[0].new_empty(0, dtype=torch.uint8)
    whole = own.new_empty(group.size(), own.numel())
    if pieces:
        _gather_flat(whole.view(-1), own, group=group)
    results, at = [], 0
    for x, length in zip(tensors, lengths, strict=True):
        shape = (group.size(), *x.shape)
        results.append(whole[:, at : at + length].view(x.dtype).view(shape) if length else x.new_empty(shape))
        at += math.ceil(length / _ALIGNMENT) * _ALIGNMENT
    return tuple(results)


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1).contiguous().view(torch.uint8)
    return pad(flat, (0, -flat.numel() % _ALIGNMENT))
