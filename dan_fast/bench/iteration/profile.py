"""Where the time of one training iteration goes, from hooks on the step's own modules."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dan_fast.bench.machine import synchronize
from dan_fast.core.types import MemoryStep
from dan_fast.data import Split
from dan_fast.functional.derivatives import in_forward_mode
from dan_fast.training import MetaStep

TRAIN, TEST, AGAIN = "S", "S~", "S again"
PROFILE_MEANING = (
    "seconds of one iteration, the device is waited for at every mark; forward: of the network's parts, losses is the "
    "rest of the pass; backward: memory and head are from the gradient of their results to that of their inputs, "
    "backbone what follows the gradient of the last map, losses the rest; S again: with order 2, the backbone with "
    "tangents and the second derivatives of what follows it; rest is everything outside of passes and optimizer: "
    "batch, competition, finite checks, inner step, sums of gradients"
)
# Parts with models and bars of their own; what is left is what a step does beside them.
_OF_THE_NETWORK = ("backbone", "head", "memory")


def share_beside(seconds: Mapping[str, float]) -> float:
    """Which share of an iteration's time is in no part of the network: losses, optimizer and rest."""
    beside = sum(value for part, value in seconds.items() if part.rpartition(" ")[2] not in _OF_THE_NETWORK)
    return beside / sum(seconds.values())


class Profile:
    """Seconds by part: "forward S: backbone", "backward S~: losses", "optimizer", "rest" and so on.

    Args:
        step: whose next step is looked at, inside `recording`.
    """

    def __init__(self, step: MetaStep) -> None:
        self.step = step
        self.seconds: dict[str, float] = defaultdict(float)
        self.part, self.passes = "", 0
        self.begun: dict[str, float] = {}
        # In a backward pass, the part that it is in.
        self.part_of_backward: str | None = None

    def _now(self) -> float:
        synchronize(self.step.device)
        return time.perf_counter()

    def _begin(self, what: str) -> None:
        self.begun[what] = self._now()

    def _end(self, what: str) -> None:
        self.seconds[what] += self._now() - self.begun.pop(what)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """One step."""
        model, optimizer = self.step.model, self.step.optimizer
        attention, functional_grad = model.network.attention, torch.autograd.grad
        head = attention.head
        parts = {"backbone": model.network.backbone}
        if model.memory is not None:
            parts["memory"] = model.memory
        handles = [
            optimizer.register_step_pre_hook(lambda *_: self._begin("optimizer")),
            optimizer.register_step_post_hook(lambda *_: self._end("optimizer")),
        ]
        for name, module in parts.items():
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._begin(f"forward {self.part}: {name}")),
                module.register_forward_hook(lambda *_, name=name: self._end(f"forward {self.part}: {name}")),
            ]
        if model.memory is not None:
            handles.append(model.memory.register_forward_hook(self._memory_is_left))
        attention.head = self._timed_head(head)
        model.maps, model.losses = self._timed_maps(model.maps), self._timed_losses(model.losses)
        # The step's only way to a gradient; its begin and end have no hook.
        torch.autograd.grad = self._timed_grad(functional_grad)
        start = self._now()
        try:
            yield
        finally:
            total = self._now() - start
            torch.autograd.grad = functional_grad
            del attention.head, model.maps, model.losses
            for handle in handles:
                handle.remove()
        for part in (TRAIN, TEST)[: self.passes]:
            inside = [f"forward {part}: {name}" for name in (*parts, "head")]
            self.seconds[f"forward {part}: losses"] -= sum(self.seconds[name] for name in inside)
            for name in parts:
                self.seconds[f"backward {part}: {name}"] += 0.0  # in the table also where no gradient came there
        self.seconds["rest"] = total - sum(self.seconds.values())

    def _timed_maps(self, maps: Callable[..., Any]) -> Callable[..., Any]:
        def timed(split: Split) -> Tensor:
            if in_forward_mode():
                self.part = AGAIN
            else:
                self.part = (TRAIN, TEST)[self.passes]
                self.passes += 1
                self._begin(f"forward {self.part}: losses")
            return maps(split)

        return timed

    def _timed_losses(self, losses: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            result = losses(*arguments)
            self._end(f"forward {self.part}: losses")
            return result

        return timed

    def _timed_head(self, head: Callable[..., Any]) -> Callable[..., Any]:
        def timed(features: Tensor, *arguments: Any) -> Any:
            self._begin(f"forward {self.part}: head")
            result = head(features, *arguments)
            self._watch([features], "backbone")
            self._watch(result, "head")
            self._end(f"forward {self.part}: head")
            return result

        return timed

    def _memory_is_left(self, memory: Any, inputs: tuple[Tensor, ...], step: MemoryStep) -> None:
        keys, _, unlabeled_keys, _ = inputs
        self._watch([keys, unlabeled_keys], "losses")
        self._watch([step.loss], "memory")

    def _watch(self, tensors: Iterable[Tensor], part: str) -> None:
        """A backward pass is in `part` from the gradient of one of `tensors` on."""
        for tensor in tensors:
            # A parameter, or a leaf, would keep its hook.
            if tensor.grad_fn is not None:
                tensor.register_hook(lambda _: self._backward_enters(part))

    def _backward_enters(self, part: str | None) -> None:
        now = self._now()
        if self.part_of_backward is not None:
            self.seconds[f"backward {self.part}: {self.part_of_backward}"] += now - self.entered
        self.part_of_backward, self.entered = part, now

    def _timed_grad(self, grad: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **settings: Any) -> Any:
            # A backward may itself ask for gradients.
            if self.part_of_backward is not None:
                return grad(*arguments, **settings)
            # torch.func, which takes second derivatives through the backbone, hands in a list.
            self._backward_enters("losses" if isinstance(arguments[0], Tensor) else "backbone")
            try:
                return grad(*arguments, **settings)
            finally:
                self._backward_enters(None)

        return timed


def in_order(part: str) -> tuple[bool, ...]:
    """S before S~ and S again, forward before backward, what belongs to neither last."""
    return part == "sum", ":" not in part, AGAIN in part, TEST in part, part.startswith("backward")
