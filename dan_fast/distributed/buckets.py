"""Sums of many tensors over the ranks, in few collectives."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed

from dan_fast.distributed.collectives import ProcessGroup

# Bytes from which a ring is limited by its bandwidth; what is handed on at once takes as much memory again.
_BUCKET = 25 * 2**20


def add_up(group: ProcessGroup, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all ranks, the same bits on each; collective, and without a gradient.

    Args:
        tensors: floating, of equal shapes and dtypes on all ranks, on one device.
        like: for each of them a tensor of its shape, dtype and device whose strides are the same on all ranks, such as
            the parameter of a gradient: in this order numbers travel.

    Returns:
        One new tensor for each, with the strides of `like` where those leave no gaps.
    """
    sums: list[Tensor] = []
    works = []
    for places in _buckets(like):
        flat = like[places[0]].new_empty(sum(like[place].numel() for place in places))
        start = 0
        for place in places:
            # A gradient's own strides may depend on how many images a rank has.
            dense = torch.empty_like(like[place], device="meta")
            part = flat.as_strided(dense.size(), dense.stride(), start)
            part.copy_(tensors[place])
            sums.append(part)
            start += part.numel()
        works.append(distributed.all_reduce(flat, group=group, async_op=True))
    for work in works:
        work.wait()
    return sums


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of neighbours of one dtype, some MB together."""
    bucket: list[int] = []
    size = 0
    for place, tensor in enumerate(tensors):
        if bucket and (size >= _BUCKET or tensor.dtype != tensors[bucket[0]].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(place)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
