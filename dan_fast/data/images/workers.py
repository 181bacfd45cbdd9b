"""A DataLoader that raises a DanFastError as it is, and whose workers leave signals to the main process."""

import copy
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch import multiprocessing
from torch.utils.data import DataLoader, Dataset

from dan_fast.core.defaults import default_cpu
from dan_fast.core.errors import DanFastError

# How often a worker looks whether its parent is there.
_WATCH_S = 5.0


class WorkerDied(DanFastError):
    """A process that reads items for a `SentenceLoader` has ended before its last item; made from what PyTorch says."""

    def __init__(self, error: BaseException) -> None:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        # A process that is not forked imports the script that started it, and ends where that starts processes too.
        forks = multiprocessing.get_start_method() == "fork"
        unguarded = "" if forks else ', or put what the script does under `if __name__ == "__main__":`'
        super().__init__(
            f"A process that decodes images has died ({reason}): often memory ran out; free some or have fewer workers"
            f"{unguarded}."
        )


class SentenceLoader(DataLoader):
    """A DataLoader that raises the DanFastError of an item itself, with workers and without.

    The state of the global generators stays as it is. A worker that was killed raises `WorkerDied` at the
    batch that it was reading; in the main thread PyTorch's SIGCHLD handler may raise RuntimeError before that.

    Args:
        dataset: what to read.
        collate: from a list of items to a batch, or from an item where `batch_size` is None.
        workers: processes that read; 0 reads in this one.
        options: as of `DataLoader`.
    """

    def __init__(self, dataset: Dataset, collate: Callable[[Any], Any], workers: int, **options: Any) -> None:
        super().__init__(
            _Sentences(dataset),
            # Not a closure: workers that are not forked need to pickle it.
            collate_fn=partial(_collated, collate),
            num_workers=workers,
            multiprocessing_context=_context() if workers else None,
            # Else each iteration would draw the workers' base seed from the global generator.
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        # Of the process that forks them, which need not be the one that made the loader.
        self.worker_init_fn = partial(_start_worker, os.getpid())
        # Not a generator, so that the worker processes are forked here, by the caller's thread, not at the first batch.
        # Generators, images and indices are on the CPU, whatever torch.set_default_device says.
        with default_cpu():
            batches = super().__iter__()
        return _Batches(batches, self.num_workers > 0)


class _Sentences(Dataset):
    """Returns a DanFastError as an item: raised in a worker, it would arrive with its traceback as text."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except DanFastError as error:
            return DanFastError(*error.args)


def _collated(collate: Callable[[Any], Any], items: Any) -> Any:
    for item in items if isinstance(items, list) else [items]:
        if isinstance(item, DanFastError):
            return item
    return collate(items)


class _Batches:
    """The batches of a loader; one that is an error is raised, and `WorkerDied` at the death of one of its workers."""

    # A class, not a generator, which would hold a batch that is an error.
    def __init__(self, batches: Iterator[Any], of_workers: bool) -> None:
        self.batches, self.of_workers = batches, of_workers

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> Any:
        try:
            with default_cpu():
                batch = next(self.batches)
        except (RuntimeError, EOFError, OSError) as error:
            if not (self.of_workers and (is_worker_death(error) or _is_lost_connection(error))):
                raise
            raise WorkerDied(error) from error
        try:
            if isinstance(batch, DanFastError):
                raise batch
            return batch
        finally:
            # The error holds this frame: as garbage in a cycle, an iterator waits five seconds for its workers to end.
            del batch


def is_worker_death(error: BaseException) -> bool:
    """Whether an error is PyTorch's, or this module's, for a worker that ended before its last item."""
    return isinstance(error, WorkerDied) or (
        isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
    )


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a batch's tensors could not be fetched, from a socket that ends with its worker.

    What an item raises in a worker arrives as an error of the same kind, whose message begins with "Caught".
    """
    kinds = (ConnectionError, EOFError, FileNotFoundError)
    return isinstance(error, kinds) and not str(error).startswith("Caught ")


def _context() -> BaseContext:
    """How the process starts others, with the event by which an iterator ends its workers in place of Python's own."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = partial(_Flag, context)
    return context


class _Flag:
    """An event without a lock: one that a killed worker held would keep the process that ends the others for ever."""

    def __init__(self, context: BaseContext) -> None:
        self._value = context.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


def _start_worker(parent: int, worker: int) -> None:
    # Garbage collection would write to every page inherited from the parent, and so copy it.
    gc.freeze()
    # All three may reach the whole process group; the main process decides what to save and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End this worker at its parent's SIGTERM, by which multiprocessing ends it at exit, and at no other one.

    And where the parent is gone: PyTorch's own watch takes who is the parent when it begins, which may be too late.
    """
    while True:
        found = signal.sigtimedwait({signal.SIGTERM}, _WATCH_S)
        if (found is not None and found.si_pid == parent) or os.getppid() != parent:
            os._exit(0)
