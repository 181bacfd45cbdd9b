"""Where the time of one training iteration goes, from hooks on the step's own modules."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dan_fast.bench.machine import synchronize
from dan_fast.training import MetaStep

TRAIN, TEST = "S", "S~"
PROFILE_MEANING = (
    "seconds of one iteration, the device is waited for at every mark; forward: of the network's parts, losses is the "
    "rest of the pass; backward: heads is from its begin to the gradient of the last map (losses, memory and attention "
    "head), backbone what follows; with order 2 the backward of S~ goes through the backward of S as well; rest is "
    "everything outside of passes and optimizer"
)


class Profile:
    """Seconds by part: "forward S: backbone", "backward S~: heads", "optimizer", "rest" and so on.

    Args:
        step: whose next step is looked at, inside `recording`.
    """

    def __init__(self, step: MetaStep) -> None:
        self.step = step
        self.seconds: dict[str, float] = defaultdict(float)
        self.part = ""
        self.begun: dict[str, float] = {}
        self.map_done: float | None = None

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
        parts = {"backbone": model.network.backbone, "memory": model.memory}
        handles = [
            model.register_forward_pre_hook(self._pass_begins),
            model.register_forward_hook(lambda *_: self._end(f"forward {self.part}: losses")),
            optimizer.register_step_pre_hook(lambda *_: self._begin("optimizer")),
            optimizer.register_step_post_hook(lambda *_: self._end("optimizer")),
        ]
        for name, module in parts.items():
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._begin(f"forward {self.part}: {name}")),
                module.register_forward_hook(lambda *_, name=name: self._end(f"forward {self.part}: {name}")),
            ]
        attention.head = self._timed_head(head)
        # The step's only way to a gradient; its begin and end have no hook.
        torch.autograd.grad = self._timed_grad(functional_grad)
        start = self._now()
        try:
            yield
        finally:
            total = self._now() - start
            torch.autograd.grad = functional_grad
            del attention.head
            for handle in handles:
                handle.remove()
        for part in (TRAIN, TEST):
            inside = [f"forward {part}: {name}" for name in (*parts, "head")]
            self.seconds[f"forward {part}: losses"] -= sum(self.seconds[name] for name in inside)
        self.seconds["rest"] = total - sum(self.seconds.values())

    def _pass_begins(self, *_: Any) -> None:
        self.part = TEST if self.part == TRAIN else TRAIN
        self._begin(f"forward {self.part}: losses")

    def _timed_head(self, head: Callable[..., Any]) -> Callable[..., Any]:
        def timed(features: torch.Tensor, *arguments: Any) -> Any:
            self._begin(f"forward {self.part}: head")
            if features.requires_grad:
                features.register_hook(self._map_is_done)
            result = head(features, *arguments)
            self._end(f"forward {self.part}: head")
            return result

        return timed

    def _map_is_done(self, gradient: torch.Tensor) -> None:
        self.map_done = self.map_done or self._now()

    def _timed_grad(self, grad: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **settings: Any) -> Any:
            # A backward may itself ask for gradients.
            if "grad" in self.begun:
                return grad(*arguments, **settings)
            self.map_done = None
            self._begin("grad")
            result = grad(*arguments, **settings)
            begin, end = self.begun.pop("grad"), self._now()
            middle = self.map_done or end
            self.seconds[f"backward {self.part}: heads"] += middle - begin
            self.seconds[f"backward {self.part}: backbone"] += end - middle
            return result

        return timed


def in_order(part: str) -> tuple[bool, bool, bool, bool]:
    """S before S~, forward before backward, what belongs to neither last."""
    return part == "sum", ":" not in part, "S~" in part, part.startswith("backward")
