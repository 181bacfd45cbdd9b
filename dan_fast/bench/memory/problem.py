"""What the memory step is timed on: two full memories of a trained network's kind, and batches for them."""

from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.bench.rows import BACKWARD
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.types import Gates, MemoryBatch, MemoryState

# A step is pure and returns the new states, or the memory, a module, keeps its own.
STEP, MODULE = "step", "module"
GATES = Gates(0.0, 0.0, 0.1)

_SLOTS_PER_PERSON = 12
# One slot in so many holds the pseudo label of another person, so that FP and FN of Eq. (14) are not empty.
_MISLABELED_EVERY = 20
_ROWS = 4096


class Size(NamedTuple):
    """Slots of M and M', numbers a key, samples a batch of each kind: those of Table II and Sec. IV-B."""

    labeled_slots: int = 9000
    unlabeled_slots: int = 5500
    key_dim: int = 2045
    batch: int = 32

    def scaled(self, scale: float) -> "Size":
        """The same with `scale` times the slots, at least one."""
        slots = (max(1, round(scale * count)) for count in self[:2])
        return Size(*slots, *self[2:])

    @property
    def slots(self) -> int:
        return self.labeled_slots + self.unlabeled_slots


PAPER = Size()


def model_bytes(size: Size, itemsize: int, use: str, kind: str) -> int:
    """The bytes a step cannot do without, a model: passes over both memories of s1 + s2 rows of d numbers.

    A memory that keeps its state is read and written once, by commit and scores in one pass, and read once more by
    the backward. A pure step reads it for the scores, reads and writes it for the new state.
    """
    passes = (2 if use == MODULE else 3) + (kind == BACKWARD)
    return passes * size.slots * size.key_dim * itemsize


def product_flop(size: Size, kind: str) -> int:
    """Operations of the products in score space: scores, the commit of the writes, and the backward's product."""
    scores = 2 * size.batch * (2 * size.labeled_slots + size.unlabeled_slots) * size.key_dim
    commit = 2 * size.batch * size.slots * size.key_dim
    return scores * (2 if kind == BACKWARD else 1) + commit


class Problem(NamedTuple):
    """One common state, and the batches every contender gets in the same order."""

    size: Size
    labeled: MemoryState
    unlabeled: MemoryState
    batches: list[MemoryBatch]

    @property
    def dtype(self) -> torch.dtype:
        return self.labeled.features.dtype

    @property
    def device(self) -> torch.device:
        return self.labeled.features.device


def make_problem(size: Size, dtype: torch.dtype, device: torch.device | str, batches: int = 8) -> Problem:
    """Memories in which a slot looks like the others of its person, as after a ReLU, and unlike those of others.

    The gap between persons is what makes contenders comparable: which slots a step clears does not hang on the last
    bit of a cosine. Some slots of M' hold each other's pseudo labels. It is the same on the same device.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    persons = max(2, size.labeled_slots // _SLOTS_PER_PERSON)
    # Centred, so that ReLU zeroes half of the numbers and persons are far from parallel.
    looks = torch.rand(persons, size.key_dim, generator=generator, device=device).sub_(0.5)

    def draw(labels: Tensor) -> Tensor:
        rows = torch.empty(len(labels), size.key_dim, dtype=dtype, device=device)
        for at in range(0, len(labels), _ROWS):
            piece = labels[at : at + _ROWS]
            noise = torch.rand(len(piece), size.key_dim, generator=generator, device=device).sub_(0.5)
            rows[at : at + _ROWS] = noise.mul_(0.3).add_(looks[piece]).relu_()
        return rows

    def memory(slots: int, mislabeled: bool) -> MemoryState:
        who = torch.randint(persons, (slots,), generator=generator, device=device)
        statistics = {"generator": generator, "device": device, "dtype": statistics_dtype(dtype)}
        usage, evaluation = torch.rand(2, slots, **statistics)
        labels = who.clone()
        if mislabeled:
            # Swapped in pairs: a person's slots stay as many as there are slots with that label.
            first = torch.arange(0, slots - 1, _MISLABELED_EVERY * 2, device=device)
            labels[first], labels[first + 1] = who[first + 1], who[first]
        ids = torch.arange(slots, device=device) if mislabeled else torch.full_like(labels, -1)
        return MemoryState(draw(who), labels, usage, evaluation / evaluation.sum(), usage.argmin(), ids)

    def batch(number: int) -> MemoryBatch:
        labels, hidden = torch.randint(persons, (2, size.batch), generator=generator, device=device)
        ids = torch.arange(size.batch, device=device) + size.unlabeled_slots + number * size.batch
        return MemoryBatch(draw(labels), labels, draw(hidden), ids)

    labeled, unlabeled = memory(size.labeled_slots, False), memory(size.unlabeled_slots, True)
    return Problem(size, labeled, unlabeled, [batch(number) for number in range(batches)])
