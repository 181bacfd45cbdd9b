"""Five ways to make the same memory step, each as a user of it would call it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dan_fast import _extension, functional, reference
from dan_fast.bench.literal import InPlaceMemory
from dan_fast.bench.problem import ALPHA, ALPHA_UNLABELED, BETA, Batch, Problem
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.types import MemoryState, MemoryStep
from dan_fast.nn import ProgressiveAugmentedMemory

# "step": pure, the new states are returned. "module": the memory keeps its own state.
STEP, MODULE = "step", "module"
KERNELS = "kernels"

GRADIENTS = ("keys", "unlabeled_keys", "alpha", "alpha_unlabeled", "beta")


class Outcome(NamedTuple):
    """What a step from the common state with the first batch gave; `gradients` as in GRADIENTS, None without."""

    loss: Tensor
    pseudo_labels: Tensor
    labeled: MemoryState
    unlabeled: MemoryState
    gradients: tuple[Tensor, ...] | None


class Runner(Protocol):
    """A contender on one problem.

    `outcome` is called once, before any `run`: a memory that keeps its state steps from the common one there.
    """

    steps: int
    returned_bytes: int  # new memories that a run returns: a result, not an overhead

    def outcome(self) -> Outcome: ...

    def run(self, backward: bool) -> object:
        """`steps` steps and all that belongs to them; returns what a caller would hold, so that it counts as memory."""
        ...


class Contender(NamedTuple):
    """A row of the table.

    Attributes:
        name: the letter's way of making the step.
        use: STEP or MODULE.
        passes: which of "forward" and "forward_backward" it can do.
        start: makes the runner; the second argument is the number of steps a module makes a run.
        literal: it goes through the memory once a sample, so its cost is estimated before it is run.
        compiled: its first calls compile.
    """

    name: str
    use: str
    passes: tuple[str, ...]
    start: Callable[[Problem, int], Runner]
    literal: bool = False
    compiled: bool = False


def _leaves(batch: Batch) -> Batch:
    return batch._replace(
        keys=batch.keys.detach().requires_grad_(), unlabeled_keys=batch.unlabeled_keys.detach().requires_grad_()
    )


class _PureStep:
    """A function that returns the new states; always from the common state."""

    steps = 1

    def __init__(
        self,
        problem: Problem,
        memory_step: Callable[..., MemoryStep],
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.problem, self.memory_step, self.context, self.next = problem, memory_step, context, 0
        self.returned_bytes = problem.labeled.features.nbytes + problem.unlabeled.features.nbytes
        values = (ALPHA, ALPHA_UNLABELED, BETA)
        # One object for all calls, as a module's parameters are: a compiled function would guard on new ones anew.
        self.gates = [
            torch.tensor(value, dtype=statistics_dtype(problem.dtype), device=problem.device, requires_grad=True)
            for value in values
        ]

    def _call(self, batch: Batch, backward: bool) -> tuple[MemoryStep, tuple[Tensor, ...] | None]:
        with self.context(), torch.set_grad_enabled(backward):
            if backward:
                batch = _leaves(batch)
            step = self.memory_step(self.problem.labeled, self.problem.unlabeled, *batch, *self.gates)
            if not backward:
                return step, None
            return step, torch.autograd.grad(step.loss, [batch.keys, batch.unlabeled_keys, *self.gates])

    def outcome(self) -> Outcome:
        step, gradients = self._call(self.problem.batches[0], True)
        return Outcome(step.loss.detach(), step.pseudo_labels, step.labeled, step.unlabeled, gradients)

    def run(self, backward: bool) -> object:
        self.next = (self.next + 1) % len(self.problem.batches)
        return self._call(self.problem.batches[self.next], backward)


class _InPlace:
    """The literal loop on a memory of its own."""

    steps, returned_bytes = 1, 0

    def __init__(self, problem: Problem, steps: int) -> None:
        self.batches, self.next = problem.batches, 0
        self.memory = InPlaceMemory(_copy(problem.labeled), _copy(problem.unlabeled))

    def _step(self, batch: Batch) -> MemoryStep:
        return self.memory.step(*batch, ALPHA, ALPHA_UNLABELED, BETA)

    def outcome(self) -> Outcome:
        return Outcome(*self._step(self.batches[0]), gradients=None)

    def run(self, backward: bool) -> object:
        self.next = (self.next + 1) % len(self.batches)
        return self._step(self.batches[self.next])


class _Module:
    """`nn.ProgressiveAugmentedMemory`: a run is several steps and the write of all that they left pending."""

    returned_bytes = 0

    def __init__(
        self, problem: Problem, steps: int, context: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        self.batches, self.steps, self.next, self.context = problem.batches, steps, 0, context
        with context():
            memory = ProgressiveAugmentedMemory(*problem.size[:3], dtype=problem.dtype).to(problem.device)
            memory.labeled, memory.unlabeled = problem.labeled, problem.unlabeled
        self.memory = memory

    def _step(self, batch: Batch, backward: bool) -> tuple[MemoryStep, tuple[Tensor, ...] | None]:
        with torch.set_grad_enabled(backward):
            if backward:
                batch = _leaves(batch)
            step = self.memory(*batch)
            if not backward:
                return step, None
            gates = (self.memory.alpha, self.memory.alpha_unlabeled, self.memory.beta_logit)
            return step, torch.autograd.grad(step.loss, [batch.keys, batch.unlabeled_keys, *gates])

    def outcome(self) -> Outcome:
        with self.context():
            step, gradients = self._step(self.batches[0], True)
            beta = self.memory.beta.detach()
            # The module's parameter is the logit; the others are compared in beta.
            gradients = (*gradients[:4], gradients[4] / (beta * (1 - beta)))
            loss, pseudo_labels = step.loss.detach(), step.pseudo_labels
            return Outcome(loss, pseudo_labels, self.memory.labeled, self.memory.unlabeled, gradients)

    def run(self, backward: bool) -> object:
        with self.context():
            for _ in range(self.steps):
                self.next = (self.next + 1) % len(self.batches)
                results = self._step(self.batches[self.next], backward)
            self.memory.settle()
        return results


def _copy(state: MemoryState) -> MemoryState:
    return MemoryState(*(x.clone() for x in state))


def _compiled_step(problem: Problem, steps: int) -> Runner:
    # Whatever was traced for another size would only be in the way, and is no part of the time to compile this one.
    torch.compiler.reset()
    return _PureStep(problem, torch.compile(functional.memory_step, dynamic=False), _extension.disabled)


_BOTH = ("forward", "forward_backward")

CONTENDERS: tuple[Contender, ...] = (
    Contender(
        "literal_autograd", STEP, _BOTH, lambda problem, steps: _PureStep(problem, reference.memory_step), literal=True
    ),
    Contender("literal_in_place", MODULE, ("forward",), _InPlace, literal=True),
    Contender(
        "score_space",
        STEP,
        _BOTH,
        lambda problem, steps: _PureStep(problem, functional.memory_step, _extension.disabled),
    ),
    Contender("score_space_compiled", STEP, _BOTH, _compiled_step, compiled=True),
    Contender(KERNELS, STEP, _BOTH, lambda problem, steps: _PureStep(problem, functional.memory_step)),
    Contender("score_space", MODULE, _BOTH, lambda problem, steps: _Module(problem, steps, _extension.disabled)),
    Contender(KERNELS, MODULE, _BOTH, _Module),
)


def select(names: Iterable[str] | None = None) -> tuple[Contender, ...]:
    """The contenders of these names, in the table's order; all of them without names.

    Raises:
        ValueError: there is no contender of a name.
    """
    known = dict.fromkeys(contender.name for contender in CONTENDERS)
    wanted = list(known if names is None else names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"there is no contender {name!r}: choose from {', '.join(known)}")
    return tuple(contender for contender in CONTENDERS if contender.name in wanted)
