"""The random numbers of a run, apart from those of the process it is a guest in."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class RunRandomNumbers:
    """The generators of the CPU and of the run's GPU, as the run has left them.

    Args:
        device: of the run.
        seed: of the run; the GPU's generator starts from it.
        after_weights: the state of the CPU's generator once the weights are drawn, from where rank 0 goes on.
        rank: of several that train together; each has numbers of its own.
        iterations_done: of the run, where a rank joins it that has not been there before.
    """

    def __init__(
        self, device: torch.device, seed: int, after_weights: Tensor, rank: int = 0, iterations_done: int = 0
    ) -> None:
        self._device = device
        self._gpus = [device] if device.type == "cuda" else []
        if rank > 0:
            # Hashed: neighbouring seeds and ranks must not give related streams.
            digest = hashlib.sha256(repr((seed, rank, iterations_done)).encode()).digest()
            seed = int.from_bytes(digest[:4], "big")
            after_weights = torch.Generator().manual_seed(seed).get_state()
        of_gpu = [torch.Generator(gpu).manual_seed(seed).get_state() for gpu in self._gpus]
        self._state: dict[str, Any] = {"cpu": after_weights, "cuda": of_gpu}

    @contextmanager
    def in_process(self) -> Iterator[None]:
        """Inside, the process's generators are those of this run, from where it last left them."""
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

    def state_dict(self) -> dict[str, Any]:
        """The states of the process's generators, which `in_process` are the run's."""
        return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(gpu) for gpu in self._gpus]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._state = state
