"""Problems for the scan over a batch, and what its PyTorch form makes of them."""

import torch
from torch import Tensor

from dan_fast import MemoryState
from dan_fast.functional.memory import scan_torch
from dan_fast.functional.memory.scan_types import ScanInput, Slots
from tests.support.memory_problems import make_keys, make_state


def _keys(kind: str, count: int, d: int, generator: torch.Generator) -> Tensor:
    # Cosines that differ late: a selection among them needs many digits.
    return (
        1 + 1e-3 * (_keys("close", count, d, generator) - 1)
        if kind == "closer"
        else make_keys(kind, count, d, generator)
    )


def _state(share: float, slots: int, d: int, classes: int, kind: str, generator: torch.Generator) -> MemoryState:
    """Empty slots hold an old evaluation, which must not be read; of an empty memory too."""
    state = make_state("full", slots, d, classes, kind, generator)
    occupied = torch.rand(slots, generator=generator) < share
    return state._replace(
        features=_keys(kind, slots, d, generator) * occupied[:, None],
        labels=torch.where(occupied, state.labels, -1),
        usage=state.usage * occupied,
        sample_ids=torch.where(occupied, state.sample_ids, -1),
    )


class Problem:
    """Two memories, a batch, and what a scan is given of them.

    `fill`: the shares of occupied slots. `kind`: one of `memory_problems.KINDS`, or "closer".
    """

    def __init__(
        self, slots, batch, d=5, classes=3, fill=(0.8, 0.8), kind="random", gates=(0.4, -0.3, 0.6), seed=0,
        dtype=torch.float64,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        states = [_state(f, s, d, classes, kind, generator) for f, s in zip(fill, slots, strict=True)]
        keys, unlabeled_keys = (_keys(kind, count, d, generator).to(dtype) for count in batch)
        self.states = [MemoryState(*(x.to(dtype) if x.is_floating_point() else x for x in s)) for s in states]
        self.keys, self.unlabeled_keys = keys, unlabeled_keys
        self.labels = torch.randint(0, classes, (batch[0],), generator=generator)
        self.sample_ids = torch.randint(0, 99, (batch[1],), generator=generator)
        self.gates = torch.tensor(gates, dtype=dtype)
        self.settings = [0.9, 0.99, d == 1]

    def arguments(self) -> list:
        queries = torch.cat([self.keys, self.unlabeled_keys])
        memories = [
            Slots(m.features.square().sum(1), m.usage, m.evaluation, m.labels, m.sample_ids, m.least_used)
            for m in self.states
        ]
        return [
            queries @ self.states[0].features.mT,
            self.unlabeled_keys @ self.states[1].features.mT,
            queries @ queries.mT,
            self.gates,
            self.labels,
            self.sample_ids,
            *memories,
            *self.settings,
        ]


def in_pytorch(arguments: list, grad_loss: float = 1.0):
    inputs = [x.detach().clone().requires_grad_() for x in arguments[:4]]
    result = scan_torch.scan(ScanInput(*inputs, *arguments[4:]))
    found = [None] * 4
    if result.loss.requires_grad:
        found = torch.autograd.grad(result.loss, inputs, torch.full_like(result.loss, grad_loss), allow_unused=True)
    return result, [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
