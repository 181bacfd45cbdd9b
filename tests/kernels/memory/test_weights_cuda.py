"""The CUDA kernels of the weights and of the false sets without a GPU: their bodies run on host threads."""

import ctypes

import pytest
import torch
from torch import Tensor

from dan_fast.functional.memory.softmax import SlotSoftmax
from tests.support.slot_problems import F64, literal_sets, sets, weights
from tests.support.toolchain import Guarded, needs_compiler

pytestmark = [pytest.mark.compile, needs_compiler]
SOURCE = "memory/weights_on_host.cpp"


def call(library: ctypes.CDLL, name: str, threads: int, rows: int, slots: int, *arrays: Tensor | None) -> None:
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in arrays]
    getattr(library, name)(ctypes.c_uint(threads), ctypes.c_int64(rows), ctypes.c_int64(slots), *pointers)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("threads, slots", [(32, 1), (32, 70), (64, 63), (96, 300), (64, 0)])
@pytest.mark.parametrize("fill", [0.6, None, 0.0])
def test_weights_and_gradients(library, threads: int, slots: int, fill: float | None, dtype: torch.dtype):
    problem = weights(slots, fill=fill, zeros=False)
    keys, features, factors = (x.to(dtype) for x in (problem.keys, problem.slots, problem.factors))
    tensors = [keys @ features.mT, features.square().sum(1), keys.square().sum(1)]
    tensors[0][:, 3:4] = 0.0
    tensors[1][3:4] = 0.0
    name = str(dtype).removeprefix("torch.")
    exact = [x.to(F64).requires_grad_() for x in tensors]
    expected = SlotSoftmax.form(*exact, problem.occupied)
    gradients = torch.autograd.grad(expected, exact, factors.to(F64))
    tolerance = 1e-12 if dtype == F64 else 3e-6

    found = []
    for _ in range(2):
        guarded = Guarded()
        result = guarded.empty((5, slots), dtype)
        call(library, f"softmax_{name}", threads, 5, slots, *tensors, problem.occupied, result)
        shapes = ((5, slots), (slots,), (5,), (5,))
        outputs = [guarded.empty(shape, dtype) for shape in shapes]
        call(library, f"softmax_backward_{name}", threads, 5, slots, *tensors, factors, result, *outputs)
        guarded.assert_untouched()
        found.append((result, *outputs))
    for a, b in zip(found[0], (expected, *gradients), strict=False):
        b = b.detach()
        ordinary = b.abs() < 1e6  # all but the gradients at the slot of norm 0
        scale = max(b[ordinary].abs().tolist(), default=0.0)
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)
    assert all(map(torch.equal, *found))


def test_an_empty_slot_takes_no_infinite_gradient_and_a_bad_key_shows_in_its_row_only(library):
    problem = weights(40, zeros=False)
    tensors = [problem.keys @ problem.slots.mT, problem.slots.square().sum(1), problem.keys.square().sum(1)]
    tensors[2][1] = torch.inf
    tensors[0][:, ~problem.occupied] = torch.nan
    result, grad_scores = torch.full((5, 40), -1.0, dtype=F64), torch.full((5, 40), -1.0, dtype=F64)
    call(library, "softmax_float64", 64, 5, 40, *tensors, problem.occupied, result)
    assert result[1, problem.occupied].isnan().all() and not result[:, ~problem.occupied].any()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(result[others].sum(1), torch.ones(4, dtype=F64))
    grad = torch.where(problem.occupied, problem.factors, torch.inf)
    rest = [torch.empty(n, dtype=F64) for n in (40, 5, 5)]
    call(library, "softmax_backward_float64", 64, 5, 40, *tensors, grad, result, grad_scores, *rest)
    assert grad_scores[others].isfinite().all() and rest[1][others].isfinite().all()
    assert not grad_scores[:, ~problem.occupied].any()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["random", "close", "ties", "equal", "odd"])
@pytest.mark.parametrize("threads, slots", [(32, 1), (64, 63), (96, 300)])
def test_sets(library, threads: int, slots: int, kind: str, dtype: torch.dtype):
    evaluation, labels, pseudo_labels = sets(slots, kind=kind, batch=4)
    evaluation = evaluation.to(dtype)
    guarded = Guarded()
    outputs = [guarded.empty((4, slots), torch.uint8) for _ in range(2)]
    name = f"false_sets_{str(dtype).removeprefix('torch.')}"
    call(library, name, threads, 4, slots, evaluation, labels, pseudo_labels, *outputs)
    guarded.assert_untouched()
    assert all((x <= 1).all() for x in outputs)
    expected = literal_sets(evaluation, labels, pseudo_labels)
    for found, members in zip(outputs, expected, strict=True):
        assert torch.equal(found.bool(), members)


def test_slots_of_more_than_two_digits(library):
    evaluation, labels, pseudo_labels = sets(70000, kind="equal", batch=1, classes=2)
    outputs = [torch.full((1, 70000), 9, dtype=torch.uint8) for _ in range(2)]
    call(library, "false_sets_float32", 64, 1, 70000, evaluation.float(), labels, torch.tensor([1]), *outputs)
    for found, members in zip(outputs, literal_sets(evaluation, labels, torch.tensor([1])), strict=True):
        assert torch.equal(found.bool(), members) and members.any()
