"""The scan's kernels on the CPU against PyTorch and the literal reference: values, gradients, faults, equal bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dan_fast import MemoryState, _extension, reference
from dan_fast.functional import memory_scan_torch
from dan_fast.functional.memory_scan_types import Slots, WrittenSlots

pytestmark = pytest.mark.skipif(not _extension.loaded(), reason=f"no extension: {_extension.why_not()}")
OPS = torch.ops.dan_fast
KINDS = ("random", "close", "repeated", "opposite", "zero", "all zero")


def make_keys(kind: str, count: int, d: int, generator: torch.Generator) -> Tensor:
    keys = torch.randn(count, d, generator=generator, dtype=torch.float64)
    if kind == "close":
        return 1 + 0.1 * keys
    if kind in ("repeated", "opposite"):
        few = torch.randn(2, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
        keys = few[torch.randint(0, 2, (count,), generator=generator)]
        signs = torch.where(torch.rand(count, 1, generator=generator) < 0.4, -0.37, 1.0)
        return keys * signs if kind == "opposite" else keys
    if kind == "zero":
        return keys * (torch.rand(count, 1, generator=generator) > 0.4)
    return keys * 0 if kind == "all zero" else keys


def make_state(fill: float, slots: int, d: int, classes: int, kind: str, generator: torch.Generator) -> MemoryState:
    """A memory as some history could have left it; its empty slots hold an old evaluation, which nobody may read."""
    occupied = torch.rand(slots, generator=generator) < fill
    usage = torch.rand(slots, generator=generator, dtype=torch.float64)
    evaluation = torch.rand(slots, generator=generator, dtype=torch.float64)
    return MemoryState(
        features=make_keys(kind, slots, d, generator) * occupied[:, None],
        labels=torch.where(occupied, torch.randint(0, classes, (slots,), generator=generator), -1),
        # Few values: ties, of which the lowest slot is taken.
        usage=(usage * 3).floor() * occupied,
        evaluation=evaluation / evaluation.sum(),
        least_used=torch.randint(0, slots, (), generator=generator),
        sample_ids=torch.where(occupied, torch.randint(0, 99, (slots,), generator=generator), -1),
    )


class Problem:
    """Two memories, a batch, and what a scan is given of them."""

    def __init__(
        self, slots, batch, d=5, classes=3, fill=(0.8, 0.8), kind="random", gates=(0.4, -0.3, 0.6), seed=0,
        dtype=torch.float64,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        states = [make_state(f, s, d, classes, kind, generator) for f, s in zip(fill, slots, strict=True)]
        keys, unlabeled_keys = (make_keys(kind, count, d, generator).to(dtype) for count in batch)
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


def scan(arguments: list) -> list[Tensor]:
    return OPS.memory_scan(*arguments[:6], list(arguments[6]), list(arguments[7]), *arguments[8:])


def gradients(arguments: list, outputs: list[Tensor], grad_loss: float = 1.0) -> tuple[Tensor, ...]:
    grad = torch.tensor(grad_loss, dtype=arguments[0].dtype)
    memories = list(arguments[6]), list(arguments[7])
    return OPS.memory_scan_backward(grad, *arguments[:6], *memories, *arguments[8:], outputs)


def in_pytorch(arguments: list, grad_loss: float = 1.0):
    inputs = [x.detach().clone().requires_grad_() for x in arguments[:4]]
    result = memory_scan_torch.scan(*inputs, *arguments[4:])
    found = [None] * 4
    if result.loss.requires_grad:
        found = torch.autograd.grad(result.loss, inputs, torch.full_like(result.loss, grad_loss), allow_unused=True)
    return result, [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, what: str = "") -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs() / (1 + expected.abs())
    assert torch.equal(actual.isfinite(), expected.isfinite()), what
    assert not (error > tolerance).any(), f"{what} off by {error.max():.3g}"


def check(problem: Problem, tolerance: float = 1e-10, slope: float = 0.0) -> list[Tensor]:
    """`slope`: where a key or slot has norm 0 its gradient is up to 1e12 times a rounding error."""
    arguments = problem.arguments()
    outputs = scan(arguments)
    expected, expected_gradients = in_pytorch(arguments, -1.7)
    agree(outputs[0], expected.loss, tolerance, "loss")
    assert torch.equal(outputs[1], expected.pseudo_labels) and torch.equal(outputs[2], expected.fault)
    for at, memory, before in ((3, expected.labeled, arguments[6]), (11, expected.unlabeled, arguments[7])):
        for name, a, b in zip(WrittenSlots._fields, outputs[at : at + 8], memory, strict=True):
            # What an empty slot holds of it is nobody's business; a memory without a write keeps it.
            untouched = name == "evaluation" and memory.held.shape[0] == 0
            agree(a, before.evaluation if untouched else b, tolerance, name)
    names = ("scores", "unlabeled_scores", "gram", "gates")
    for name, a, b in zip(names, gradients(arguments, outputs, -1.7), expected_gradients, strict=True):
        if slope:
            assert a.isfinite().all() and b.isfinite().all()
            continue
        agree(a, b, tolerance, f"gradient of {name}")
    return outputs


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    slots=st.tuples(*[st.one_of(st.integers(1, 9), st.sampled_from([17, 33, 70]))] * 2),
    batch=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    d=st.sampled_from([1, 2, 5]),
    classes=st.integers(1, 4),
    fill=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2),
    kind=st.sampled_from(KINDS),
    gates=st.sampled_from([(0.4, -0.3, 0.6), (-30.0, 30.0, 0.0), (2.0, -3.0, 1.0)]),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients_are_those_of_pytorch(slots, batch, d, classes, fill, kind, gates, seed):
    problem = Problem(slots, batch, d, classes, fill, kind, gates, seed)
    check(problem, slope=float("zero" in kind))
