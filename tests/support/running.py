"""Ways to run operators: with so many threads, in new memory that holds NaN, and telling which of them ran."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Called(TorchDispatchMode):
    """Collects the operators that run, so that a test can tell a kernel from PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def new_memory_poisoned() -> Iterator[None]:
    """New memory holds NaN and the largest integers, so that a result that is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def by_threads(run: Callable[[], Any], counts: Sequence[int] = (1, 2, 1, 3)) -> list[Any]:
    """What `run` gives with so many threads, one after the other."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results
