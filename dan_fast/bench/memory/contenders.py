"""Five ways to make the same memory step, each as a user of it would call it, and whether two are the same."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast import _extension, functional, reference
from dan_fast.bench.agreement import Agreement, compare_tensors
from dan_fast.bench.memory.literal import InPlaceMemory, in_place_step
from dan_fast.bench.memory.problem import GATES, MODULE, STEP, Problem
from dan_fast.bench.rows import BACKWARD, FORWARD
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.types import MemoryBatch, MemoryState, MemoryStep
from dan_fast.nn import ProgressiveAugmentedMemory

NAMES = ("literal_autograd", "literal_in_place", "score_space", "score_space_compiled", "kernels")
LITERAL, IN_PLACE, SCORE_SPACE, COMPILED, KERNELS = NAMES

GRADIENTS = ("keys", "unlabeled_keys", "alpha", "alpha_unlabeled", "beta")


class Outcome(NamedTuple):
    """What a step from the common state with the first batch gave; `gradients` as in GRADIENTS, None without."""

    loss: Tensor
    pseudo_labels: Tensor
    labeled: MemoryState
    unlabeled: MemoryState
    gradients: tuple[Tensor, ...] | None


@dataclass
class Runner:
    """A contender on one problem; what a run returns is all that a caller would hold.

    `outcome` is called once, before any `run`: a memory that keeps its state steps from the common one there.

    Args:
        gates: leaves of the graph, in the order of GRADIENTS; None: it has no gradients.
        context: entered around every call.
        returned_bytes: of new memories that a run returns: a result, not an overhead.
        memory: a module; its run takes all batches and writes what the steps left pending. Of others it is one step.
    """

    problem: Problem
    step: Callable[[MemoryBatch], MemoryStep]
    gates: Sequence[Tensor] | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    returned_bytes: int = 0
    memory: ProgressiveAugmentedMemory | None = None
    next: int = 0

    @property
    def steps(self) -> int:
        return 1 if self.memory is None else len(self.problem.batches)

    def call(self, batch: MemoryBatch, backward: bool) -> tuple[MemoryStep, tuple[Tensor, ...] | None]:
        with self.context(), torch.set_grad_enabled(backward):
            if not backward:
                return self.step(batch), None
            leaves = [keys.detach().requires_grad_() for keys in (batch.keys, batch.unlabeled_keys)]
            step = self.step(batch._replace(keys=leaves[0], unlabeled_keys=leaves[1]))
            return step, torch.autograd.grad(step.loss, [*leaves, *self.gates])

    def outcome(self) -> Outcome:
        step, gradients = self.call(self.problem.batches[0], self.gates is not None)
        if self.memory is not None:
            # The module's parameter is the logit; the others are compared in beta.
            beta = self.memory.beta.detach()
            gradients = (*gradients[:4], gradients[4] / (beta * (1 - beta)))
        with self.context():  # a module writes its states where they are asked for
            return Outcome(step.loss.detach(), step.pseudo_labels, step.labeled, step.unlabeled, gradients)

    def run(self, backward: bool) -> object:
        for _ in range(self.steps):
            self.next = (self.next + 1) % len(self.problem.batches)
            result = self.call(self.problem.batches[self.next], backward)
        if self.memory is not None:
            with self.context():
                self.memory.settle()
        return result


class Contender(NamedTuple):
    """A way of making the step, in one use: STEP or MODULE."""

    name: str
    use: str

    @property
    def literal(self) -> bool:
        """It goes through the memory once a sample; its cost is estimated before it is run."""
        return self.name in (LITERAL, IN_PLACE)

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD,) if self.name == IN_PLACE else (FORWARD, BACKWARD)

    def start(self, problem: Problem) -> Runner:
        """Its runner; a pure step is always from the common state, a module has memories of its own."""
        context = _extension.disabled if self.name in (SCORE_SPACE, COMPILED) else nullcontext
        if self.name == IN_PLACE:
            memories = [InPlaceMemory(MemoryState(*(x.clone() for x in state))) for state in problem[1:3]]
            return Runner(problem, lambda batch: in_place_step(*memories, batch, GATES))
        if self.use == MODULE:
            with context():
                memory = ProgressiveAugmentedMemory(*problem.size[:3], dtype=problem.dtype).to(problem.device)
                memory.labeled, memory.unlabeled = problem.labeled, problem.unlabeled
            gates = (memory.alpha, memory.alpha_unlabeled, memory.beta_logit)
            return Runner(problem, lambda batch: memory(*batch), gates, context, memory=memory)
        step = reference.memory_step if self.name == LITERAL else functional.memory_step
        if self.name == COMPILED:
            # Whatever was traced for another size would only be in the way, and is no part of the time to compile this.
            torch.compiler.reset()
            step = torch.compile(step, dynamic=False)
        kind = {"dtype": statistics_dtype(problem.dtype), "device": problem.device}
        # One object for all calls, as a module's parameters are: a compiled function would guard on new ones anew.
        gates = [torch.tensor(value, requires_grad=True, **kind) for value in GATES[:3]]
        states = problem.labeled, problem.unlabeled
        returned = sum(state.features.nbytes for state in states)
        return Runner(problem, lambda batch: step(*states, *batch, *gates), gates, context, returned)


# In the table's order.
CONTENDERS = (
    Contender(LITERAL, STEP),
    Contender(IN_PLACE, MODULE),
    *(Contender(name, STEP) for name in (SCORE_SPACE, COMPILED, KERNELS)),
    *(Contender(name, MODULE) for name in (SCORE_SPACE, KERNELS)),
)


# How far a contender may be from the one it is compared with, as a share of the largest number in the tensor. Every
# slot gets about 1/s of a key, so `statistics`, of usage and evaluation, has to be far below 1/s. `changed` is the
# share of the features that may differ at all: half precision rounds away most of an error, so that the largest
# difference alone would not show a missing write.
TOLERANCES = {
    torch.float64: {"loss": 1e-12, "statistics": 1e-12, "features": 1e-12, "gradients": 1e-10, "changed": 1.0},
    # The literal form's own gradients of unlabelled keys are 2e-5 from float64 at a quarter of the paper's slots, ten
    # times as far as score space's, and further with more slots.
    torch.float32: {"loss": 1e-5, "statistics": 5e-6, "features": 2e-6, "gradients": 1e-3, "changed": 1.0},
    # Features and the keys' gradients are rounded to 8 and 11 bits at the end; everything else is float32.
    torch.bfloat16: {"loss": 1e-5, "statistics": 5e-6, "features": 2**-7, "gradients": 2**-6, "changed": 0.02},
    torch.float16: {"loss": 1e-5, "statistics": 5e-6, "features": 2**-10, "gradients": 2**-9, "changed": 0.02},
}
_KINDS = {"usage": "statistics", "evaluation": "statistics", "features": "features"}


def compare(outcome: Outcome, expected: Outcome, dtype: torch.dtype) -> Agreement:
    """Loss, pseudo labels, gradients (where both have them) and both new states, from the same state and batch."""
    tolerance, different = TOLERANCES[dtype], []
    pairs = [("loss", outcome.loss, expected.loss, tolerance["loss"])]
    pairs.append(("pseudo_labels", outcome.pseudo_labels, expected.pseudo_labels, None))
    for memory in ("labeled", "unlabeled"):
        actual, wanted = getattr(outcome, memory), getattr(expected, memory)
        states = zip(MemoryState._fields, actual, wanted, strict=True)
        pairs += [(f"{memory}.{field}", *both, tolerance.get(_KINDS.get(field))) for field, *both in states]
        if actual.features.shape == wanted.features.shape:
            changed = int((actual.features != wanted.features).sum()) / wanted.features.numel()
            if changed > (allowed := tolerance["changed"]):
                different.append(f"{memory}.features in {changed:.1%} of the numbers (allowed {allowed:.0%})")
    if outcome.gradients is not None and expected.gradients is not None:
        for name, *both in zip(GRADIENTS, outcome.gradients, expected.gradients, strict=True):
            pairs.append((f"gradient of {name}", *both, tolerance["gradients"]))
    return compare_tensors(pairs, math.inf, different=different)
