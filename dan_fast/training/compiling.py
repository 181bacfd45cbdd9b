"""`run.compile`: a backbone compiled by `torch.compile`, where the run's own iterations are faster with it."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dan_fast.core.batches import Split
from dan_fast.core.devices import synchronize
from dan_fast.core.errors import DanFastError
from dan_fast.daml import Stage
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.training.config import TrainConfig
from dan_fast.training.step import MetaStep, StepResult

_WARM_UP, _PAIRS = 2, 8
# Of the norm of the features; half precision rounds in every layer.
_TOLERANCES = {None: 1e-3, torch.bfloat16: 3e-2}
# With draws of its own a compiled backbone would mix other styles than the one that it is compared with.
_OPTIONS = {"fallback_random": True}


def require_compilable(config: TrainConfig, process_group: ProcessGroup | None = None) -> None:
    """Refuse what a compiled backbone cannot do, and several ranks, which would have to agree on what is faster."""
    if not config.run.compile:
        return
    if process_group is not None:
        raise DanFastError("A backbone is compiled for one process alone: set run.compile to false with several ranks.")
    if config.meta.order == 2 and config.meta.procedure != "daml1":
        raise DanFastError(
            "A compiled backbone has no second derivatives: set run.compile to false or meta.order to 1."
        )
    if config.model.gradient_checkpointing:
        raise DanFastError(
            "A backbone whose maps are computed again is not compiled: set run.compile or model.gradient_checkpointing "
            "to false."
        )


class CompiledWhereFaster:
    """Has a step's backbone compiled, if wanted, after two iterations, and after 16 more, in pairs, keeps the faster.

    Each iteration is one of the training. Outside of `iteration` the backbone is always as it was: evaluations,
    checkpoints and copies are unaffected.

    Attributes:
        outcome: which was taken, and why, in one sentence; "" while it is not known.
        say: called with that sentence, and before it with one that the compiler runs; to be set by the caller.
    """

    def __init__(self, step: MetaStep, wanted: bool) -> None:
        self.outcome = ""
        self.say: Callable[[str], None] = lambda sentence: None
        self._step, self._backbone = step, step.model.network.backbone
        self._measuring = wanted
        self._done = 0
        self._compiled: Any = None
        # Iterations with another stage have other backward passes.
        self._seconds: dict[tuple[Stage | None, bool], list[float]] = defaultdict(list)

    def step(self, meta_train: Split, meta_test: Split | None) -> StepResult:
        """`MetaStep.step`, with the compiled backbone or without."""
        if not self._measuring:
            if self._compiled is None:
                return self._step.step(meta_train, meta_test)
            with self._in_use(self._compiled):
                return self._step.step(meta_train, meta_test)
        if self._done == _WARM_UP and not self._compile(meta_train):
            return self.step(meta_train, meta_test)
        compiled = self._done > _WARM_UP and (self._done - _WARM_UP) % 2 == 1
        began = self._now()
        with self._in_use(self._compiled if compiled else None):
            result = self._step.step(meta_train, meta_test)
        if self._done >= _WARM_UP:
            self._seconds[result.stage, compiled].append(self._now() - began)
        self._done += 1
        if self._done == _WARM_UP + 2 * _PAIRS:
            self._choose()
        return result

    def _compile(self, split: Split) -> bool:
        self.say("Compiling the backbone.")
        try:
            self._backbone.compile(options=_OPTIONS)
            self._compiled, self._backbone._compiled_call_impl = self._backbone._compiled_call_impl, None
            error = _difference(self._step, split, self._in_use, self._compiled)
        except Exception as reason:  # the compiler's errors have no common class
            lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
            self._keep(False, f"torch.compile failed ({type(reason).__name__}: {(lines or ['no reason given'])[0]})")
            return False
        tolerance = _TOLERANCES[self._step.model.autocast_dtype]
        if not error <= tolerance:
            self._keep(False, f"its features differ by {error:.1e} of their norm, more than {tolerance:.0e}")
            return False
        return True

    def _choose(self) -> None:
        stages = {stage for stage, _ in self._seconds}
        stage = max(stages, key=lambda stage: min(len(self._seconds[stage, which]) for which in (False, True)))
        if not (self._seconds[stage, False] and self._seconds[stage, True]):
            return self._keep(False, "no two iterations of one stage could be compared")
        plain, compiled = (median(self._seconds[stage, which]) for which in (False, True))
        self._keep(compiled < plain, f"{compiled:.3f} s an iteration compiled, {plain:.3f} s without")

    def _keep(self, compiled: bool, reason: str) -> None:
        self._measuring = False
        if not compiled:
            self._compiled = None
        self.outcome = f"The backbone is {'compiled' if compiled else 'not compiled'}: {reason}."
        self.say(self.outcome)

    @contextmanager
    def _in_use(self, compiled: Any) -> Iterator[None]:
        # A module calls this in place of its forward, and its names and its state stay what they are.
        self._backbone._compiled_call_impl = compiled
        try:
            yield
        finally:
            self._backbone._compiled_call_impl = None

    def _now(self) -> float:
        synchronize(self._step.device)
        return time.perf_counter()


def _difference(step: MetaStep, split: Split, in_use: Callable[[Any], Any], compiled: Any) -> float:
    """How far the compiled backbone's features are from the plain one's, as a share of their norm.

    Forward and backward are compiled for parameters and for the tensors that the inner step puts in their place, and
    forward for constants, which these are where the adversary has won: none of it is left for an iteration of the run.
    Buffers and the random state are put back.
    """
    model, device = step.model, step.device
    network = model.network
    lenders = model.lenders(split)
    images = split.images.to(device, memory_format=torch.channels_last)
    buffers = {name: value.clone() for name, value in network.named_buffers()}

    def features(params: dict[str, Tensor]) -> Tensor:
        # The step's batch norm counts this batch on its own.
        values = {**params, **{name: value.clone() for name, value in buffers.items()}}
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, model.autocast_dtype, enabled=model.autocast_dtype is not None),
        ):
            labels = split.labels[: len(images) - (lenders or 0)].to(device)
            return torch.func.functional_call(network, values, (images, labels, lenders)).pooled

    own = dict(network.named_parameters())
    moved = {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in own.items()}
    with torch.no_grad():
        expected = features(own)
    errors = []
    with in_use(compiled):
        for params in (own, moved):
            found = features(params)
            trained = [value for value in params.values() if value.requires_grad]
            torch.autograd.grad(found.float().sum(), trained, allow_unused=True)
            errors.append((found.detach() - expected).norm())
        if step.competes:
            found = features({name: value.detach() for name, value in own.items()})
            errors.append((found - expected).norm())
    return float(torch.stack(errors).max() / expected.norm())
