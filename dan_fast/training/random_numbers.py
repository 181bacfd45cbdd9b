"""The random numbers of a run, apart from those of the process it is a guest in."""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError

# The process's generators are those of one run at a time; a process that was forked meanwhile has its own.
_TAKEN: dict[int, threading.Lock] = {}


class RunRandomNumbers:
    """The generators of the CPU and of the run's GPU, as the run has left them.

    Args:
        device: of the run.
        seed: of the run; the GPU's generator starts from it.
        after_weights: the state of the CPU's generator once the weights are drawn, from where rank 0 goes on.
        rank: of several that train together; each has numbers of its own.
    """

    def __init__(self, device: torch.device, seed: int, after_weights: Tensor, rank: int = 0) -> None:
        self._device, self._seed, self._rank = device, seed, rank
        self._gpus = [device] if device.type == "cuda" else []
        self._state = self._started(after_weights, seed) if rank == 0 else self._of_rank(0)

    def _started(self, of_cpu: Tensor, seed: int) -> dict[str, Any]:
        return {"cpu": of_cpu, "cuda": [torch.Generator(gpu).manual_seed(seed).get_state() for gpu in self._gpus]}

    def _of_rank(self, iterations_done: int) -> dict[str, Any]:
        """What a rank but the first begins with that joins the run after so many iterations."""
        # Hashed: neighbouring seeds and ranks must not give related streams.
        digest = hashlib.sha256(repr((self._seed, self._rank, iterations_done)).encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        return self._started(torch.Generator().manual_seed(seed).get_state(), seed)

    @contextmanager
    def in_process(self) -> Iterator[None]:
        """Inside, the process's generators are those of this run, from where it last left them.

        Raises:
            DanFastError: a run of another thread has them.
        """
        taken = _TAKEN.setdefault(os.getpid(), threading.Lock())
        if not taken.acquire(blocking=False):
            raise DanFastError(
                "Another thread of this process trains, and both would draw from the same random numbers: wait for it, "
                "or train in a process of its own."
            )
        try:
            with torch.random.fork_rng(devices=self._gpus):
                torch.set_rng_state(self._state["cpu"])
                of_gpu = self._state["cuda"]
                if self._gpus and of_gpu:
                    # Older checkpoints hold the states of all GPUs.
                    index = torch.cuda.current_device() if self._device.index is None else self._device.index
                    torch.cuda.set_rng_state(of_gpu[index % len(of_gpu)], self._device)
                try:
                    yield
                finally:
                    self._state = self.state_dict()
        finally:
            taken.release()

    def state_dict(self) -> dict[str, Any]:
        """The states of the process's generators, which `in_process` are the run's."""
        return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(gpu) for gpu in self._gpus]}

    def load_state_dicts(self, of_ranks: Sequence[dict[str, Any]], ranks: int, iterations_done: int) -> None:
        """Go on from what `state_dict` gave on each rank; ranks but the first start anew where they were not as many.

        Args:
            of_ranks: by rank, of a run that has so many iterations done.
            ranks: that train now.
        """
        known = self._rank == 0 or ranks == len(of_ranks)
        anew = self._of_rank(iterations_done)
        self._state = of_ranks[self._rank] if known else anew
        if self._gpus and not self._state["cuda"]:
            # The run was on CPUs before.
            self._state = {**self._state, "cuda": anew["cuda"]}
