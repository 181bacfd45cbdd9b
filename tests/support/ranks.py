"""Processes that stay and run one function after another as the ranks of a gloo group."""

import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import get_context
from torch.utils._python_dispatch import TorchDispatchMode


def forking_context() -> BaseContext:
    """Its processes fork from one that has imported what takes seconds, and has computed nothing yet."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["dan_fast.evaluation", "dan_fast.training"])
    return context


class Ranks:
    """`world` processes, which a file of tests shares; a context that ends them.

    They have one seed for the hashes of str, unlike processes of torchrun. A collective fails in which a rank is not
    heard of for two minutes.
    """

    def __init__(self, world: int, store: Path) -> None:
        context = forking_context()
        self.world = world
        self._tasks, self._results = [context.Queue() for _ in range(world)], context.Queue()
        given = [(rank, world, store, tasks, self._results) for rank, tasks in enumerate(self._tasks)]
        self._processes = [context.Process(target=_work, args=each, daemon=True) for each in given]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(group, *arguments)` returns on each rank; what one raises is raised here."""
        for tasks in self._tasks:
            tasks.put((function, arguments))
        results = sorted((self._results.get(timeout=600) for _ in self._tasks), key=lambda result: result[0])
        failed = [f"rank {rank}: {error}" for rank, _, error in results if error]
        assert not failed, "\n".join(failed)
        return [value for _, value, _ in results]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(60)
            process.kill()


def _work(rank: int, world: int, store: Path, tasks: Queue, results: Queue) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=store.as_uri(), rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            results.put((rank, function(distributed.group.WORLD, *arguments), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    distributed.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts the collectives inside of it, and the bytes that this rank hands to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            given = args[1] if name == "allgather_base" else args[0][0]
            self.calls[name] += 1
            self.bytes[name] += given.numel() * given.element_size()
        return func(*args, **(kwargs or {}))
