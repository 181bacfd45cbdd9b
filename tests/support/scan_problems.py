"""Problems for the scan over a batch, and what is true of it on every device.

A device is a function `Run`: by the operators on the CPU or on a GPU, or by the CUDA kernels on host threads.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dan_fast import MemoryState
from dan_fast.functional.memory import scan_torch
from dan_fast.functional.memory.scan_types import RetrievalRecord, ScanInput, Slots, WriteRecord, WrittenSlots
from tests.support.memory_problems import make_keys, make_state


def _keys(kind: str, count: int, d: int, generator: torch.Generator) -> Tensor:
    if kind == "closer":  # cosines that differ late: a selection among them needs many digits
        return 1 + 1e-3 * (make_keys("close", count, d, generator) - 1)
    return make_keys(kind, count, d, generator)


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


PROBLEMS: dict[str, dict[str, Any]] = {
    "some full": {"slots": (20, 30), "batch": (3, 4)},
    "blocks": {"slots": (150, 180), "batch": (3, 4), "seed": 1},
    "more slots than threads": {"slots": (150, 333), "batch": (2, 5), "seed": 2},
    "many keys": {"slots": (40, 25), "batch": (20, 19), "seed": 3},
    "empty": {"slots": (9, 8), "batch": (3, 4), "seed": 4, "fill": (0, 0)},
    "half full": {"slots": (70, 70), "batch": (4, 4), "seed": 5, "fill": (0.5, 0.5)},
    "full": {"slots": (33, 65), "batch": (3, 5), "seed": 6, "fill": (1, 1)},
    "fewer slots than samples": {"slots": (3, 2), "batch": (6, 7), "seed": 7},
    "one slot": {"slots": (1, 1), "batch": (3, 3), "seed": 8},
    "scalar keys": {"slots": (20, 30), "batch": (4, 5), "seed": 9, "d": 1},
    "scalar keys, some zero": {"slots": (20, 30), "batch": (4, 5), "seed": 10, "d": 1, "kind": "zero"},
    "ties": {"slots": (40, 300), "batch": (3, 5), "seed": 11, "fill": (1, 1), "kind": "repeated"},
    "ties over blocks": {"slots": (40, 180), "batch": (2, 4), "seed": 12, "fill": (1, 1), "kind": "repeated", "d": 2},
    "zero keys": {"slots": (20, 30), "batch": (4, 6), "seed": 13, "kind": "zero"},
    "close keys": {"slots": (20, 90), "batch": (3, 6), "seed": 14, "fill": (1, 1), "kind": "closer"},
    "one class": {"slots": (20, 30), "batch": (3, 4), "seed": 15, "classes": 1},
    "more of a label than others": {"slots": (20, 30), "batch": (5, 9), "classes": 2},
    "no labelled sample": {"slots": (20, 30), "batch": (0, 4), "seed": 16},
    "no unlabelled sample": {"slots": (20, 30), "batch": (4, 0), "seed": 17},
    "no sample": {"slots": (20, 30), "batch": (0, 0), "seed": 18},
    "nothing to retrieve from": {"slots": (9, 30), "batch": (0, 4), "seed": 19, "fill": (0, 1)},
    "only M' empty": {"slots": (20, 30), "batch": (2, 4), "seed": 20, "fill": (1, 0)},
}
SELECTING = {"blocks", "ties", "ties over blocks", "close keys", "more slots than threads", "full"}
SELECTING |= {"more of a label than others", "several chunks", "several chunks of ties"}


class Found(NamedTuple):
    """The outputs of the operator, and the gradients of scores, unlabeled scores, Gram matrix and gates."""

    loss: Tensor
    pseudo_labels: Tensor
    fault: Tensor
    labeled: WrittenSlots
    unlabeled: WrittenSlots
    labeled_record: WriteRecord
    unlabeled_record: WriteRecord
    retrieval: RetrievalRecord
    gradients: Sequence[Tensor]
    flat: list[Tensor]

    @classmethod
    def of(cls, outputs: list[Tensor], gradients: Sequence[Tensor]) -> "Found":
        rest, groups = outputs[3:], []
        for group in (WrittenSlots, WrittenSlots, WriteRecord, WriteRecord, RetrievalRecord):
            groups.append(group(*rest[: len(group._fields)]))
            rest = rest[len(group._fields) :]
        return cls(*outputs[:3], *groups, gradients, [*outputs, *gradients])


Run = Callable[..., Found]  # of the arguments and, if it is not 1, the gradient of the loss


def by_operators(arguments: list, grad_loss: float = 1.0) -> Found:
    ops = torch.ops.dan_fast
    arguments = [list(x) if isinstance(x, Slots) else x for x in arguments]
    outputs = ops.memory_scan(*arguments)
    return Found.of(outputs, ops.memory_scan_backward(torch.full_like(outputs[0], grad_loss), *arguments, outputs))


def in_dtype(arguments: list, dtype: torch.dtype) -> list:
    def cast(x: Any) -> Any:
        if isinstance(x, Slots):
            return Slots(*map(cast, x))
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return [cast(x) for x in arguments]


def in_pytorch(arguments: list, grad_loss: float = 1.0):
    inputs = [x.detach().clone().requires_grad_() for x in arguments[:4]]
    result = scan_torch.scan(ScanInput(*inputs, *arguments[4:]))
    found = [None] * 4
    if result.loss.requires_grad:
        found = torch.autograd.grad(result.loss, inputs, torch.full_like(result.loss, grad_loss), allow_unused=True)
    return result, [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def assert_right(run: Run, arguments: list, what: str = "") -> Found:
    """Values and gradients against the PyTorch form, a 1e-10 or, in float32, what its rounding leaves."""
    result, gradients = in_pytorch(arguments, -1.7)
    found = run(arguments, -1.7)
    relative, absolute = (1e-10, 1e-10) if found.loss.dtype == torch.float64 else (2e-3, 2e-4)

    def agree(name: str, actual: Tensor, expected: Tensor, noise: Tensor | float = 0.0) -> None:
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
        assert actual.isfinite().all() and expected.isfinite().all(), f"{name} of {what}"
        excess = (actual.double() - expected.double()).abs() - absolute - relative * expected.double().abs() - noise
        assert not (excess > 0).any(), f"{name} of {what} off by {excess.max():.3g}"

    agree("loss", found.loss, result.loss.detach())
    assert torch.equal(found.pseudo_labels, result.pseudo_labels) and torch.equal(found.fault, result.fault)
    for after, expected in ((found.labeled, result.labeled), (found.unlabeled, result.unlabeled)):
        if expected.held.shape[0] == 0:  # what an empty slot holds of it is not read; without a write it stays
            after, expected = (x._replace(evaluation=x.evaluation * (x.labels >= 0)) for x in (after, expected))
        for name, a, b in zip(WrittenSlots._fields, after, expected, strict=True):
            agree(name, a, b)
    # A key or a slot of length 0 counts as one of length 1e-12 and multiplies rounding errors by 1e12.
    lengths = arguments[2].diagonal()[:, None].clamp(min=1e-24).sqrt()
    norms = [memory.square_norms.clamp(min=1e-24).sqrt() for memory in arguments[6:8]]
    unlabeled_lengths = lengths[arguments[4].numel() :]
    noise = [1e-14 / x for x in (lengths * norms[0], unlabeled_lengths * norms[1], lengths * lengths.mT)] + [0.0]
    for name, a, b, extra in zip(ScanInput._fields, found.gradients, gradients, noise, strict=False):
        agree(f"gradient of {name}", a, b, extra)
    assert not any(x.isnan().any() for x in found.flat if x.is_floating_point()), f"{what}: something was not written"
    if what in SELECTING:
        assert (found.retrieval.false_sums[:, 0] > 0).any(), "no sample was false: the selection was not used"
    return found


def _spoiled(arguments: list, at: int, index: tuple[int, ...], value: float) -> list:
    spoiled = list(arguments)
    spoiled[at] = arguments[at].clone()
    spoiled[at][index] = value
    return spoiled


def _with_least_used(arguments: list, at: int, value: int) -> list:
    spoiled = list(arguments)
    spoiled[at] = arguments[at]._replace(least_used=torch.tensor(value))
    return spoiled


def assert_faults_change_nothing(run: Run, dtype: torch.dtype) -> None:
    """And are told, several at a time too; the gradients are 0 whatever the values."""
    arguments = Problem((7, 8), (2, 3), dtype=dtype).arguments()
    inf, nan = float("inf"), float("nan")
    faulty = {
        1: [_spoiled(arguments, 2, (0, 0), nan), _spoiled(arguments, 2, (1, 1), inf)],
        2: [_spoiled(arguments, 2, (2, 2), inf), _spoiled(arguments, 2, (4, 4), -nan)],
        4: [_spoiled(arguments, 4, (1,), -1)],
        8: [_spoiled(arguments, 5, (2,), -5)],
        16: [_spoiled(arguments, 3, (0,), nan)],
        32: [_spoiled(arguments, 3, (1,), -inf)],
        64: [_spoiled(arguments, 3, (2,), inf)],
        128: [_with_least_used(arguments, 6, -1), _with_least_used(arguments, 6, 7)],
        256: [_with_least_used(arguments, 7, -1), _with_least_used(arguments, 7, 8)],
        68: [_spoiled(_spoiled(arguments, 4, (0,), -1), 3, (2,), nan)],
        80: [_spoiled(_spoiled(arguments, 3, (0,), nan), 3, (2,), nan)],
    }
    for bits, cases in faulty.items():
        for case in cases:
            found = run(case)
            assert found.fault == bits and found.fault.dtype == torch.int32
            assert found.loss.isnan() and (found.pseudo_labels == -1).all()
            for after, before in ((found.labeled, case[6]), (found.unlabeled, case[7])):
                assert (after.kept == 1).all() and (after.held == 0).all()
                assert all(torch.equal(getattr(after, name), x) for name, x in zip(Slots._fields, before, strict=True))
            left = (*found.labeled_record, *found.unlabeled_record, *found.retrieval, *found.gradients)
            assert not any(x.any() for x in left)


def results() -> list[Tensor]:
    """What the kernels make of problems with several chunks, odd sizes, cleared slots and ties, in both dtypes."""
    found = []
    for dtype in (torch.float32, torch.float64):
        for slots, kind in (((1300, 1111), "random"), ((600, 531), "repeated"), ((13, 7), "close")):
            arguments = Problem(slots, (5, 6), d=7, kind=kind, classes=3, dtype=dtype).arguments()
            # The BLAS may round by the number of threads: that is not what is compared.
            arguments[:3] = [(x * 64).round() / 64 for x in arguments[:3]]
            found += by_operators(arguments).flat
    return found
