"""A DataLoader that raises a DanFastError as it is, and whose workers leave Ctrl-C to the main process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dan_fast.errors import DanFastError


class SentenceLoader(DataLoader):
    """A DataLoader that raises the DanFastError of an item itself, with workers and without.

    The state of the global generators stays as it is.

    Args:
        dataset: what to read.
        collate: from a list of items to a batch, or from an item where `batch_size` is None.
        workers: processes that read; 0 reads in this one.
        options: as of `DataLoader`.
    """

    def __init__(self, dataset: Dataset, collate: Callable[[Any], Any], workers: int, **options: Any) -> None:
        super().__init__(
            _Sentences(dataset),
            collate_fn=_Collate(collate),
            num_workers=workers,
            # Else each iteration would draw the workers' base seed from the global generator.
            generator=torch.Generator(),
            worker_init_fn=_ignore_interrupt,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        # Not a generator: the worker processes are forked here, by the caller's thread, not at the first batch.
        return map(_raised, super().__iter__())


class _Sentences(Dataset):
    """Hands a DanFastError on as an item: raised in a worker, it would arrive with its traceback as text."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except DanFastError as error:
            return DanFastError(*error.args)


class _Collate:
    # A class, not a closure: workers that are not forked need to pickle it.
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        for item in items if isinstance(items, list) else [items]:
            if isinstance(item, DanFastError):
                return item
        return self.collate(items)


def _raised(batch: Any) -> Any:
    if isinstance(batch, DanFastError):
        raise batch
    return batch


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides what to save and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
