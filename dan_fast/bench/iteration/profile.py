"""Where the time of one training iteration goes, by functions around the step's own."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dan_fast.core.devices import synchronize
from dan_fast.data import Split
from dan_fast.functional.derivatives import in_forward_mode
from dan_fast.training import MetaStep

TRAIN, TEST, AGAIN = "S", "S~", "S again"


class Profile:
    """Seconds by part of a step in `recording`: "forward S: backbone", "backward S~: losses", "optimizer", "rest"."""

    def __init__(self, step: MetaStep) -> None:
        self.step = step
        self.seconds: dict[str, float] = defaultdict(float)
        self.part, self.passes = "", 0
        # In a backward pass, the part that it is in.
        self.part_of_backward: str | None = None

    def now(self) -> float:
        """When all that was begun on the device is done."""
        synchronize(self.step.device)
        return time.perf_counter()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """One step."""
        model = self.step.model
        forward = {"backbone": (model.network.backbone, "forward"), "head": (model.network.attention, "head")}
        if model.memory is not None:
            forward["memory"] = model.memory, "forward"
        around = {where: partial(self._forward, name) for name, where in forward.items()}
        # `torch.autograd.grad` is the step's only way to a gradient; its begin and end have no hook.
        around |= {(model, "maps"): self._maps, (model, "losses"): self._losses, (torch.autograd, "grad"): self._grad}
        around[self.step.optimizer, "step"] = partial(self._timed, "optimizer")
        with ExitStack() as stack:
            for (owner, name), timed in around.items():
                stack.enter_context(patch.object(owner, name, partial(timed, getattr(owner, name))))
            start = self.now()
            yield
            total = self.now() - start
        for part in (TRAIN, TEST)[: self.passes]:
            self.seconds[f"forward {part}: losses"] -= sum(self.seconds[f"forward {part}: {name}"] for name in forward)
            for name in forward:
                self.seconds[f"backward {part}: {name}"] += 0.0  # in the table also where no gradient came there
        self.seconds["rest"] = total - sum(self.seconds.values())

    def _timed(self, part: str, call: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        start = self.now()
        result = call(*arguments, **settings)
        self.seconds[part] += self.now() - start
        return result

    def _forward(self, name: str, forward: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """A part of the network; a backward pass leaves it with the gradients of its inputs."""
        result = self._timed(f"forward {self.part}: {name}", forward, *arguments, **settings)
        if name == "head":
            self._watch(arguments[:1], "backbone")
            self._watch(result, name)
        elif name == "memory":
            keys, _, unlabeled_keys, _ = arguments
            self._watch([keys, unlabeled_keys], "losses")
            self._watch([result.loss], name)
        return result

    def _maps(self, maps: Callable[..., Any], split: Split) -> Tensor:
        if in_forward_mode():
            self.part = AGAIN
        else:
            self.part = (TRAIN, TEST)[self.passes]
            self.passes += 1
            self.pass_begun = self.now()
        return maps(split)

    def _losses(self, losses: Callable[..., Any], *arguments: Any) -> Any:
        result = losses(*arguments)
        self.seconds[f"forward {self.part}: losses"] += self.now() - self.pass_begun
        return result

    def _watch(self, tensors: Iterable[Tensor], part: str) -> None:
        """A backward pass is in `part` from the gradient of one of `tensors` on."""
        for tensor in tensors:
            # A parameter, or a leaf, would keep its hook.
            if tensor.grad_fn is not None:
                tensor.register_hook(lambda _: self._backward_enters(part))

    def _backward_enters(self, part: str | None) -> None:
        now = self.now()
        if self.part_of_backward is not None:
            self.seconds[f"backward {self.part}: {self.part_of_backward}"] += now - self.entered
        self.part_of_backward, self.entered = part, now

    def _grad(self, grad: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        # A backward may itself ask for gradients.
        if self.part_of_backward is not None:
            return grad(*arguments, **settings)
        # torch.func, which takes second derivatives through the backbone, hands in a list.
        self._backward_enters("losses" if isinstance(arguments[0], Tensor) else "backbone")
        try:
            return grad(*arguments, **settings)
        finally:
            self._backward_enters(None)


def in_order(part: str) -> tuple[bool, ...]:
    """S before S~ and S again, forward before backward, what belongs to neither last."""
    return part == "sum", ":" not in part, AGAIN in part, TEST in part, part.startswith("backward")
