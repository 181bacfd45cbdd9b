"""A memory whose writes wait: `features = kept * base + weights^T keys`, formed when the next batch reads it.

A batch needs of the memory only its scores against the keys and its row norms. The pass that computes them
folds in what waits from the batch before, so that a step reads and writes the memory once, and its backward
reads it once more.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import _disable_current_modes

from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.signals import interrupts_held
from dan_fast.core.types import MemoryState, MemoryStep
from dan_fast.functional.memory.passes import memory_combine, memory_commit, memory_commit_scores_, memory_scores
from dan_fast.functional.products import product

# Pending writes cost a (T, s) matrix and a product of that size a step; beyond this many one pass over the
# memory is cheaper, and float32 row norms have gone through enough additions.
MAX_PENDING = 128


@contextmanager
def outside_of_tracing() -> Iterator[None]:
    """Where tensors are numbers: those of a transform of `torch.func` or of an export are nothing outside of it."""
    # Other modes go on: they count or check what is computed.
    fakes = _disable_current_modes() if detect_fake_mode() is not None else nullcontext()
    with temporarily_clear_interpreter_stack(), fakes:
        yield


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """Where a memory's tensors are made: those of inference mode could be in no graph of a later step."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def require_no_capture(features: Tensor) -> None:
    """Refuse a memory inside of the capture of a CUDA graph: the tensors that it lies in change with each step."""
    # Of fake tensors there may be some without a driver, which would be asked.
    if features.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph would replay this from the memory of now: capture functional.memory_step or "
            "functional.discriminative_loss, and copy the states that a step returns into those that it was given"
        )


class _Base:
    """The features before the pending writes, and what still counts on them staying as they are."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.shared = False  # handed out as a snapshot, which may not change
        self.holders: weakref.WeakSet[PendingMemory] = weakref.WeakSet()
        self._readers: list[weakref.ref[Tensor]] = []

    def for_graph(self) -> Tensor:
        """The features under a name of their own, which lives as long as a graph that was made with it."""
        alias = self.features.detach()
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            # What a hook packs may be another tensor of these numbers, and the alias gone.
            self.shared = True
        self._readers = [reader for reader in self._readers if reader() is not None]
        self._readers.append(weakref.ref(alias))
        return alias

    def is_read_by_a_graph(self) -> bool:
        return any(reader() is not None for reader in self._readers)

    def is_shared(self) -> bool:
        """Whether somebody may read these features who does not know of later writes, another process included."""
        return self.shared or (self.features.device.type == "cpu" and self.features.is_shared())


class _CommittedScores(torch.autograd.Function):
    """Scores that are known already, with the gradient of `memory_scores`."""

    @staticmethod
    def forward(ctx, keys: Tensor, base: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(base)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return memory_combine(grad, *ctx.saved_tensors), None, None


@dataclass(eq=False)
class PendingMemory:
    """A `MemoryState` with writes that have not reached its features yet. No tensor in it carries a gradient.

    The features are overwritten only when nothing else counts on them: no graph whose backward is to come, no
    memory of an earlier step, no snapshot handed out.

    Attributes:
        labels, usage, evaluation, least_used, sample_ids: as in `MemoryState`, always up to date.
        kept: (s,) 1, or 0 where a pending write has cleared the slot; None when nothing is pending.
        weights: (T, s) what slot i holds of pending key t; None when nothing is pending.
        keys: (T, d) the pending keys; None when nothing is pending.
        square_norms: (s,) |m_i|^2 with the pending writes; None: not computed yet.
    """

    _base: _Base
    labels: Tensor
    usage: Tensor
    evaluation: Tensor
    least_used: Tensor
    sample_ids: Tensor
    kept: Tensor | None = None
    weights: Tensor | None = None
    keys: Tensor | None = None
    square_norms: Tensor | None = None

    def __post_init__(self) -> None:
        self._base.holders.add(self)

    @classmethod
    def of(cls, state: MemoryState, **fields: Any) -> Self:
        """Without copying: the features are given away, to be overwritten in later steps.

        Only tensors of inference mode are copied.
        """
        with lasting_tensors():
            state = MemoryState(*(x.clone() if x.is_inference() else x.detach() for x in state))
        return cls(_Base(state.features), *state[1:], **fields)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PendingMemory":
        # Copies and files hold the settled state: what else counts on the features is not theirs.
        self.settle()
        return self.like(copy.deepcopy(self.unsettled(), memo))

    def __reduce__(self) -> tuple:
        # Another process may share the storage of a snapshot, which later steps leave alone.
        return _received, (self.snapshot(),)

    def like(self, state: MemoryState) -> "PendingMemory":
        """`of`, for a state that takes the place of this memory; its features are those of `rows`."""
        return PendingMemory.of(state)

    @property
    def rows(self) -> slice:
        """The slots whose features are held here."""
        return slice(None)

    @property
    def shape(self) -> tuple[int, int]:
        """(s, d), whatever part of it is held here."""
        return self.labels.numel(), self.base.shape[1]

    @property
    def base(self) -> Tensor:
        """(s, d) the features before the pending writes; not to be kept."""
        return self._base.features

    @property
    def dtype(self) -> torch.dtype:
        return statistics_dtype(self.base.dtype)

    @property
    def pending(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0]

    def read(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, s) of `keys` (B, d), with their gradient, and |m_i|^2 (s,), both with the pending writes.

        `keys` are in the dtype of statistics.
        """
        return self.completed(keys, *self.read_base(keys, self.has_to_wait()))

    def has_to_wait(self) -> bool:
        """Whether what is pending goes on waiting because something counts on the features as they are."""
        return 0 < self.pending <= MAX_PENDING and self.is_counted_on()

    def read_base(self, keys: Tensor, waits: bool) -> tuple[Tensor, Tensor]:
        """Scores and square norms of the rows of `base`, with the pending writes unless these go on waiting."""
        require_no_capture(self.base)
        if self.pending and not waits:
            if not (self.is_counted_on() or self._base.is_shared()):
                scores, norms = self._commit_in_place(keys)
                if keys.requires_grad and torch.is_grad_enabled():
                    scores = _CommittedScores.apply(keys, self._base.for_graph(), scores)
                return scores, norms
            self._settle_into_new()
        return memory_scores(keys, self._base.for_graph())

    def completed(self, keys: Tensor, scores: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """What `read` returns, from what `read_base` found."""
        if self.pending:
            with_pending = product(keys, self.keys.to(self.dtype).mT)
            return product(with_pending, self.weights, scores * self.kept), self.square_norms
        self.square_norms = norms.detach()
        return scores, self.square_norms

    def is_counted_on(self) -> bool:
        """Whether a graph or the memory of another step needs the features as they are.

        Snapshots are no part of it: a checkpoint takes one, and may not have later keys wait, which are added in
        another order. That is all it takes on a CPU. On a GPU a pass that commits and scores rounds otherwise than one
        that only scores, so a snapshot changes no bit only where every step is settled.
        """
        return len(self._base.holders) > 1 or self._base.is_read_by_a_graph()

    def _commit_in_place(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        version, given = self.base._version, self._of_rows(self.kept, self.weights, self.keys)
        # Ctrl-C in between would leave writes that are both made and waiting, or of which a part is made.
        with interrupts_held():
            try:
                return memory_commit_scores_(self.base, *given, keys.detach())
            finally:
                # Refused, or out of memory: nothing has been written, unless what failed came after it, as scores may.
                if self.base._version != version:
                    self.kept = self.weights = self.keys = self.square_norms = None

    def _of_rows(self, kept: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is pending for the rows of `base`."""
        return kept, weights, keys

    def _settle_into_new(self) -> None:
        features, _ = memory_commit(self.base, *self._of_rows(self.kept, self.weights, self.keys))
        old, new = self._base, _Base(features)
        new.holders.add(self)
        # No call in between, where Ctrl-C could leave one changed without the other.
        self._base = new
        self.kept = self.weights = self.keys = self.square_norms = None
        old.holders.discard(self)

    def settle(self) -> None:
        """Write what is pending."""
        require_no_capture(self.base)
        if self.pending:
            self._write_pending()

    @torch.compiler.disable(reason="keys wait to be written to the memory: call its settle() before what is compiled")
    def _write_pending(self) -> None:
        with lasting_tensors(), outside_of_tracing():
            if self.is_counted_on() or self._base.is_shared():
                self._settle_into_new()
            else:
                self._commit_in_place(self.keys.new_empty((0, self.keys.shape[1]), dtype=self.dtype))

    def snapshot(self) -> MemoryState:
        """The state, settled; later steps leave these tensors alone."""
        self.settle()
        self._base.shared = True
        return self.unsettled()

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> "PendingMemory":
        """The settled memory with `fn` of every tensor, of which only the features take its dtype.

        Usage and evaluation stay in the dtype of statistics, and integers what they are.
        """
        self.settle()
        features, rest = fn(self.base), {}
        for name, old in self.unsettled()._asdict().items():
            if name != "features":
                dtype = statistics_dtype(features.dtype) if old.is_floating_point() else old.dtype
                new = fn(old)
                # From what it was: a step through half precision would round it.
                rest[name] = new if new.dtype == dtype else old.to(new.device, dtype)
        if features is not self.base:
            return self.like(MemoryState(features, **rest))
        # Nothing has moved: what counted on these features still does.
        return replace(self, **rest)

    def unsettled(self) -> MemoryState:
        """Everything up to date except the features, which are those of `base`."""
        return MemoryState(self.base, self.labels, self.usage, self.evaluation, self.least_used, self.sample_ids)

    def after(self, kept: Tensor, weights: Tensor, keys: Tensor, **up_to_date: Tensor) -> "PendingMemory":
        """The memory after a further batch: `kept` (s,) and `weights` (T, s) of it, `keys` (T, d)."""
        if self.pending:
            weights = torch.cat([self.weights * kept, weights])
            keys = torch.cat([self.keys, keys])
            kept = self.kept * kept
        return replace(self, kept=kept, weights=weights, keys=keys, **up_to_date)


def _received(state: MemoryState) -> PendingMemory:
    # Copied here, where the state has arrived: storage of a copy made by the sender may be gone before that.
    return PendingMemory.of(state._replace(features=state.features.clone()))


class LazyStep(MemoryStep):
    """A `MemoryStep` that settles a memory's pending writes when that memory is looked at."""

    __slots__ = ()

    @property
    def labeled(self) -> MemoryState:
        return self[2]

    @property
    def unlabeled(self) -> MemoryState:
        return self[3]

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index] if isinstance(index, slice) else _settled(super().__getitem__(index))

    def __iter__(self) -> Iterator[Any]:
        return map(_settled, super().__iter__())

    def __repr__(self) -> str:
        return repr(MemoryStep(*self))


def _settled(value: Any) -> Any:
    return value.snapshot() if isinstance(value, PendingMemory) else value
