"""One batch ahead: the next batch is read, copied and augmented while the caller works on this one."""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Raw = TypeVar("Raw")
Ready = TypeVar("Ready")


def one_ahead(items: Iterator[Raw], prepare: Callable[[Raw], Ready], device: torch.device) -> Iterator[Ready]:
    """`map(prepare, items)`, in order, with the next result prepared in a thread.

    On a GPU the thread's work is launched on a stream of its own, so that copies and kernels overlap with the caller's;
    the caller's stream waits for the result, the host does not.

    Args:
        items: read in the thread, one at a time.
        prepare: from an item to tensors on `device`, a tensor or a tuple with tuples in it.
        device: where they are.

    Raises:
        Exception: what `items` or `prepare` raised, at the place of that item.

    Example:
        >>> list(one_ahead(iter([1, 2, 3]), lambda number: number + 1, torch.device("cpu")))
        [2, 3, 4]
    """
    stream = None
    if device.type == "cuda":
        stream = _stream(torch.cuda.current_device() if device.index is None else device.index)

    def work() -> tuple[Ready, torch.cuda.Event | None]:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            ready = prepare(next(items))
            return ready, None if stream is None else stream.record_event()

    with ThreadPoolExecutor(1, "dan-fast feed") as thread:
        ahead = thread.submit(work)
        try:
            while True:
                try:
                    ready, event = ahead.result()
                except StopIteration:
                    return
                ahead = thread.submit(work)
                if event is not None:
                    current = torch.cuda.current_stream(device)
                    current.wait_event(event)
                    # Allocated on the other stream: its memory must not be reused before this stream is done with it.
                    for each in tree_leaves(ready):
                        if isinstance(each, Tensor) and each.is_cuda:
                            each.record_stream(current)
                yield ready
        finally:
            # Its error holds this frame, and by its thread's frame the items, which would be garbage in a cycle.
            del ahead


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """One for all feeds of a GPU: memory that was allocated for a stream is used again by that stream alone."""
    return torch.cuda.Stream(index)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to a GPU by way of page-locked memory, without waiting."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
