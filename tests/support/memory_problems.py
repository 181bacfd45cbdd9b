"""Random problems for the memory step, and when two correct implementations may decide one differently.

A problem is a pair of memories as some history could have left them and mini-batches to send through them. Every
decision of the step (argmin of usage, argmax of retrieval, the n largest) compares numbers that two implementations
round differently. `closest_call` replays a batch literally and says how close its closest decision was, so that a test
can excuse a difference there and nowhere else.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from dan_fast import MemoryState, reference
from dan_fast.core.cosine import norm_from_square
from dan_fast.core.types import Gates, MemoryBatch
from dan_fast.nn import ProgressiveAugmentedMemory

KINDS = (
    "random",
    "repeated",  # two vectors, again and again
    "parallel",  # their multiples
    "opposite",  # and their negatives
    "basis",  # unit vectors: most cosines are 0 or 1
    "zero",  # two in five are zero
    "all zero",
    "close",
    "scaled",  # lengths from 1e-4 to 1e4
)
_STEPS = 2.0**40  # cosines in one, in float64
FILLS = ("empty", "one", "half", "full")
GATES = (-30.0, -3.0, 0.0, 2.0, 30.0)
Tensors = Tensor | Sequence[Tensor]


def agree(actual: Tensors, expected: Tensors, tolerance: float = 1e-10, floor: float = 0.0) -> None:
    """`|a - b| <= tolerance (1 + |b|) + floor`, both finite, of tensors or of each of several."""
    if not isinstance(expected, Tensor):
        for a, b in zip(actual, expected, strict=True):
            agree(a, b, tolerance, floor)
        return
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    assert actual.isfinite().all() and expected.isfinite().all()
    error = (actual - expected).abs()
    assert (error <= tolerance * (1 + expected.abs()) + floor).all(), f"off by {error.max().item():.3g}"


def make_keys(kind: str, count: int, d: int, generator: torch.Generator) -> Tensor:
    """(count, d) float64 keys of a kind in `KINDS`."""
    keys = torch.randn(count, d, generator=generator, dtype=torch.float64)
    few = torch.randn(2, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    few = few[torch.randint(0, 2, (count,), generator=generator)]
    uniform = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    match kind:
        case "repeated":
            return few
        case "parallel":
            return few * (0.1 + 3 * uniform)
        case "opposite":
            return few * torch.where(uniform < 0.4, -0.37 - uniform, 1.0)
        case "basis":
            return torch.eye(d, dtype=torch.float64)[torch.randint(0, d, (count,), generator=generator)]
        case "zero":
            return keys * (uniform > 0.4)
        case "all zero":
            return keys * 0
        case "close":
            return 1 + 0.1 * keys
        case "scaled":
            return keys * 10 ** (8 * uniform - 4)
    return keys


def make_labels(count: int, classes: int, generator: torch.Generator) -> Tensor:
    """(count,) labels of which the low ones are frequent."""
    return (torch.rand(count, generator=generator) ** 2 * classes).long()


def make_state(fill: str, slots: int, d: int, classes: int, kind: str, generator: torch.Generator) -> MemoryState:
    """A memory as some history could have left it, with ties in usage and, in empty slots, an old evaluation."""
    state = MemoryState.empty(slots, d, torch.float64)
    wanted = {"empty": 0, "one": 1, "half": (slots + 1) // 2, "full": slots}[fill]
    if wanted == 0:
        return state
    occupied = torch.zeros(slots, dtype=torch.bool)
    occupied[torch.randperm(slots, generator=generator)[:wanted]] = True
    usage = torch.randint(0, 3, (slots,), generator=generator) * occupied
    # Some histories end with a slot that was assigned, not chosen.
    assigned = torch.randint(0, 4 * slots, (), generator=generator)
    evaluation = torch.rand(slots, generator=generator, dtype=torch.float64)
    return MemoryState(
        features=make_keys(kind, slots, d, generator) * occupied[:, None],
        labels=torch.where(occupied, make_labels(slots, classes, generator), -1),
        usage=usage.double(),
        evaluation=evaluation / evaluation.sum(),
        least_used=assigned if assigned < slots else usage.argmin(),
        sample_ids=torch.where(occupied, torch.randint(0, 30, (slots,), generator=generator), -1),
    )


def in_dtype(state: MemoryState, dtype: torch.dtype) -> MemoryState:
    """`state` with features in `dtype` and everything else as such a memory keeps it."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return state._replace(
        features=state.features.to(dtype), usage=state.usage.to(wide), evaluation=state.evaluation.to(wide)
    )


@dataclass(frozen=True)
class Problem:
    """`slots` and `batch` are (M, M') and the largest (B, B'); `values` raw alpha, raw alpha', beta."""

    slots: tuple[int, int]
    d: int
    batch: tuple[int, int]
    classes: int
    fill: tuple[str, str]
    values: tuple[float, float, float]
    decays: tuple[float, float]
    count: int
    seed: int

    @property
    def gates(self) -> Gates:
        return Gates(*self.values, *self.decays)

    @property
    def kind(self) -> str:
        return KINDS[self.seed % len(KINDS)]

    def start(self) -> list[MemoryState]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            make_state(fill, slots, self.d, self.classes, self.kind, generator)
            for fill, slots in zip(self.fill, self.slots, strict=True)
        ]

    def batches(self) -> Iterator[MemoryBatch]:
        """`count` batches, one in three of another size than `batch`."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        for at in range(self.count):
            sizes = [
                size if at % 3 else int(torch.randint(0, size + 1, (), generator=generator)) for size in self.batch
            ]
            yield MemoryBatch(
                make_keys(self.kind, sizes[0], self.d, generator),
                make_labels(sizes[0], self.classes, generator),
                make_keys(self.kind, sizes[1], self.d, generator),
                torch.randint(0, 30, (sizes[1],), generator=generator),
            )


def problems(max_slots: int = 70, max_dim: int = 17, counts: tuple[int, int] = (2, 6)) -> st.SearchStrategy[Problem]:
    """Memories of one slot and of more than a vector register holds, at every fill, of every kind of key."""
    slots = st.one_of(st.integers(1, 9), st.sampled_from([n for n in (16, 17, 33, 70) if n <= max_slots]))
    size = st.integers(0, 6)
    decay = st.sampled_from([0.0, 0.5, 0.99, 1.0])
    return st.builds(
        Problem,
        slots=st.tuples(slots, slots),
        d=st.one_of(st.just(1), st.integers(2, 6), st.just(max_dim)),
        batch=st.tuples(size, size),
        classes=st.integers(1, 4),
        fill=st.tuples(st.sampled_from(FILLS), st.sampled_from(FILLS)),
        values=st.tuples(st.sampled_from(GATES), st.sampled_from(GATES), st.sampled_from([0.0, 0.3, 1.0])),
        decays=st.tuples(decay, decay),
        count=st.integers(*counts),
        seed=st.integers(0, 2**20),
    )


def module_of(states: Sequence[MemoryState], gates: Gates) -> ProgressiveAugmentedMemory:
    """A module that holds copies of these states and gates; beta, made of a logit, may not be 0 or 1."""
    slots = [state.labels.numel() for state in states]
    memory = ProgressiveAugmentedMemory(*slots, states[0].features.shape[1], *gates[3:], dtype=states[0].features.dtype)
    memory.labeled, memory.unlabeled = states
    with torch.no_grad():
        memory.alpha.fill_(gates.alpha)
        memory.alpha_unlabeled.fill_(gates.alpha_unlabeled)
        memory.beta_logit.fill_(torch.tensor(gates.beta, dtype=torch.float64).logit())
    return memory


class Closeness(NamedTuple):
    """How near a batch came to being decided otherwise.

    Attributes:
        usage: the least distance of a slot's usage to the smallest, among those that differ from it at all.
        cosine: how far the closest of the compared cosines would have to move for another slot to win.
        cancellation: the least |m + w k| / (|m| + |w k|) of a write, 1 if nothing cancelled: score space has
            the square norm of what is left to an error of rounding over its square.
    """

    usage: float
    cosine: float
    cancellation: float

    def least(self, other: "Closeness") -> "Closeness":
        return Closeness(*map(min, self, other))


def _usage_gap(usage: Tensor, ties_hold: bool) -> float:
    if not ties_hold and usage.min() > 0:
        return usage.sort().values[:2].diff().sum().item() if usage.numel() > 1 else math.inf
    # Equal histories, and empty slots, have equal bits on every path: no close call.
    others = usage[usage > usage.min()]
    return (others.min() - usage.min()).item() if others.numel() else math.inf


def _cosine(key: Tensor, memory: MemoryState) -> Tensor:
    lengths = norm_from_square(key.square().sum()) * norm_from_square(memory.features.square().sum(1))
    return memory.features @ key / lengths


def _cosine_gap(cosine: Tensor, chosen: Tensor, others: Tensor, ties_hold: bool) -> float:
    """Between the lowest of `chosen` and the highest of `others`, both bool: which would have to change places."""
    if not chosen.any() or not others.any():
        return math.inf
    pair = torch.stack([cosine[chosen].min(), cosine[others].max()])
    gap = pair.diff().abs().item()
    if not ties_hold or gap > 2 / _STEPS:
        return gap
    # On the grid a tie is a tie, unless one of the two lies where the grid's cells meet.
    return (((pair * _STEPS).frac().abs() - 0.5).abs().min() / _STEPS).item()


class Calls(NamedTuple):
    """The closest decisions of a batch, by what depends on them.

    Attributes:
        labeled: of the writes to M, which depend on nothing else.
        retrieval: of each unlabelled sample's pseudo label, which depends on M and on no other sample.
        unlabeled: of the sets and writes in M'.
    """

    labeled: Closeness
    retrieval: list[float]
    unlabeled: Closeness


def closest_call(states: Sequence[MemoryState], batch: MemoryBatch, gates: Gates) -> Closeness:
    """The closest decision in a batch, where ties hold; see `closest_calls`."""
    calls = closest_calls(states, batch, gates)
    closest = calls.labeled.least(calls.unlabeled)
    return closest._replace(cosine=min([closest.cosine, *calls.retrieval]))


def closest_calls(states: Sequence[MemoryState], batch: MemoryBatch, gates: Gates, ties_hold: bool = True) -> Calls:
    """The closest decisions in a batch, which `reference` replays in float64 one sample at a time.

    `ties_hold`: an exact tie stays one on the other path, as the grid of cosines sees to in float64.
    """
    labeled, unlabeled = (in_dtype(state, torch.float64) for state in states)
    batch = MemoryBatch(*(x.detach().double() if x.is_floating_point() else x for x in batch))
    none = MemoryBatch(*(x[:0] for x in batch))
    gates = Gates(*map(float, gates))
    in_labeled = in_unlabeled = Closeness(math.inf, math.inf, 1.0)
    retrieval = [math.inf] * len(batch.sample_ids)

    def usage_gap(usage: Tensor) -> float:
        return _usage_gap(usage, ties_hold)

    def cosine_gap(cosine: Tensor, chosen: Tensor, others: Tensor) -> float:
        return _cosine_gap(cosine, chosen, others, ties_hold)

    def written(before: Tensor, after: MemoryState, slot: Tensor) -> Closeness:
        before = before.clone()
        before[slot] = 0
        parts = before.norm(dim=1) + (after.features - before).norm(dim=1)
        left = torch.where(parts > 0, after.features.norm(dim=1) / parts, 1.0)
        return Closeness(usage_gap(after.usage), math.inf, left.min().item())

    for at in range(batch.keys.shape[0]):
        one = none._replace(keys=batch.keys[at : at + 1], labels=batch.labels[at : at + 1])
        new = reference.memory_step(labeled, unlabeled, *one, *gates).labeled
        in_labeled = in_labeled.least(written(labeled.features, new, labeled.least_used))
        labeled = new
    for at in range(batch.unlabeled_keys.shape[0]):
        rows = slice(at, at + 1)
        one = none._replace(unlabeled_keys=batch.unlabeled_keys[rows], sample_ids=batch.sample_ids[rows])
        step = reference.memory_step(labeled, unlabeled, *one, *gates)
        if step.pseudo_labels[0] < 0:
            continue
        key = batch.unlabeled_keys[at]
        label = step.pseudo_labels[0]
        cosine = _cosine(key, labeled)
        best = torch.zeros_like(labeled.occupied)
        best[reference.cosine_softmax(key[None], labeled.features, labeled.occupied)[0].argmax()] = True
        retrieval[at] = cosine_gap(cosine, best, labeled.occupied & (labeled.labels != label))
        # T: the slots of the label without FP, and FN.
        weights = reference.cosine_softmax(key[None], unlabeled.features, unlabeled.occupied)
        false_positive, false_negative = (
            sets[0] for sets in reference.false_sample_sets(weights, unlabeled.labels, label[None])
        )
        largest = ((unlabeled.labels == label) & ~false_positive) | false_negative
        cosine = _cosine(key, unlabeled)
        sets = cosine_gap(cosine, largest, unlabeled.occupied & ~largest)
        false = false_positive | false_negative
        usage = unlabeled.usage.masked_fill(false, 0.0)
        in_unlabeled = in_unlabeled.least(Closeness(usage_gap(usage), sets, 1.0))
        kept = unlabeled.features.masked_fill(false[:, None], 0.0)
        in_unlabeled = in_unlabeled.least(written(kept, step.unlabeled, usage.argmin()))
        unlabeled = step.unlabeled
    return Calls(in_labeled, retrieval, in_unlabeled)
