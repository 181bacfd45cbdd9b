"""`cosine_softmax`, with the sets made of it: values, derivatives, which path serves, bits, the compiler."""

import math

import pytest
import torch
from torch import Tensor

from dan_fast import _extension, functional, reference
from dan_fast.functional.memory.row_norms import row_sq_norms
from tests.support.draws import draw
from tests.support.memory_problems import agree
from tests.support.running import Called, by_threads
from tests.support.slot_problems import F64, SIZES, Weights, operands, weights
from tests.support.toolchain import needs_extension


def with_gradients(function, problem: Weights) -> tuple[Tensor, ...]:
    """The weights, and the first and second derivatives of a loss in keys and slots."""
    keys, slots = (x.detach().clone().requires_grad_() for x in problem[:2])
    result = function(keys, slots, problem.occupied)
    loss = (result * problem.factors.to(result.dtype)).sum() + result.square().sum()
    first = torch.autograd.grad(loss, [keys, slots], create_graph=True)
    # The derivative in a slot of norm 0 is some 1e12: it would drown the others.
    long = slots.detach().any(1)
    squares = first[0].double().square().sum() + first[1][long].double().square().sum()
    second = torch.autograd.grad(squares, [keys, slots])
    return result.detach(), *(x.detach() for x in first), *second


def scale(tensor: Tensor) -> float:
    return max(1e-30, tensor.double().abs().max().item()) if tensor.numel() else 1.0


PROBLEMS = [(slots, 5, 7, fill) for slots in SIZES for fill in (0.6, None, 0.0)]
PROBLEMS += [(9, 0, 3, 0.6), (9, 2, 0, 0.6), (0, 0, 0, 0.6), (1, 1, 1, 0.6), (513, 1, 2, 0.6), (1024, 70, 3, 0.6)]


@pytest.mark.parametrize("slots, batch, dim, fill", PROBLEMS)
def test_weights_and_two_derivatives_agree_with_the_reference(slots: int, batch: int, dim: int, fill: float | None):
    problem = weights(slots, batch, dim, fill)
    actual, expected = (with_gradients(impl.cosine_softmax, problem) for impl in (functional, reference))
    agree(actual, expected, 1e-10)
    if slots > 1 and dim > 3 and fill != 0.0:
        assert all(x.abs().sum() > 0 for x in expected)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_have_a_gradient_beside_keys_that_have_none(dtype: torch.dtype):
    keys, slots = draw(4, 5, dtype=dtype), draw(6, 5, seed=1, dtype=dtype)
    found = []
    for function, kind in ((functional.cosine_softmax, dtype), (reference.cosine_softmax, F64)):
        own = slots.to(kind).requires_grad_()
        found += torch.autograd.grad(function(keys.to(kind), own)[:, 0].sum(), own)
    torch.testing.assert_close(found[0].double(), found[1], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slots", [63, 2000])
def test_the_error_is_at_most_twice_that_of_pytorch(slots: int, dtype: torch.dtype):
    problem = weights(slots, batch=16, dim=64, zeros=False).to(dtype)
    exact = with_gradients(reference.cosine_softmax, problem.to(F64))
    same_precision = with_gradients(reference.cosine_softmax, problem)
    actual = with_gradients(functional.cosine_softmax, problem)
    assert actual[0].dtype == torch.float32 and all(x.dtype == dtype for x in actual[1:])
    # Of the second derivatives in half precision the first ones' rounding leaves nothing to compare.
    for a, b, e in list(zip(actual, same_precision, exact, strict=True))[: 5 if dtype == torch.float32 else 3]:
        allowed = 2 * (b.double() - e).abs().max() + 1e-7 * scale(e)
        assert (a.double() - e).abs().max() <= allowed


def test_the_layout_of_a_gradient_does_not_matter():
    """That of a sum is one number, expanded."""
    problem = weights(30, batch=4, dim=6)

    def plain(*arguments: Tensor) -> Tensor:
        result = functional.cosine_softmax(*arguments)
        return result[:, :5].sum() + result

    def views(*arguments: Tensor) -> Tensor:
        result = functional.cosine_softmax(*arguments)
        return result[:, :5].sum().expand(4, 30) + result.T.contiguous().T

    agree(*(with_gradients(function, problem) for function in (views, plain)), 1e-12)


def test_gradgradcheck():
    # No slots of norm 0: a finite difference would step over the floor that acts there.
    problem = weights(11, batch=3, dim=4, seed=2, zeros=False)
    keys, slots = (x.requires_grad_() for x in problem[:2])
    for occupied in (problem.occupied, None):

        def function(k: Tensor, m: Tensor, occupied: Tensor | None = occupied) -> Tensor:
            return functional.cosine_softmax(k, m, occupied)

        assert torch.autograd.gradcheck(function, (keys, slots), atol=1e-5)
        assert torch.autograd.gradgradcheck(function, (keys, slots), atol=1e-5)


def test_a_loss_that_is_infinite_at_empty_slots_has_finite_gradients():
    problem = weights(40)
    keys = problem.keys.clone().requires_grad_()
    found = []
    for impl in (functional, reference):
        result = impl.cosine_softmax(keys, problem.slots, problem.occupied)
        found += torch.autograd.grad(torch.log(result).sum(), keys)
    assert found[0].isfinite().all()
    agree(*found, 1e-10)


@needs_extension
def test_each_is_one_operator_and_the_pytorch_form_gives_the_same():
    problem = weights(100)
    evaluation = functional.cosine_softmax(*problem[:3])
    labels, pseudo_labels = torch.arange(100) % 4 - 1, torch.tensor([0, 1, 2, -1, 9])
    with Called() as called:
        found = with_gradients(functional.cosine_softmax, problem)
        sets = functional.false_sample_sets(evaluation, labels, pseudo_labels)
    names = {"slot_softmax", "memory_scores", "row_sq_norms", "false_sample_sets"}
    assert {f"dan_fast::{name}" for name in names} <= called.names
    assert not called.names & {"aten::sort.stable", "aten::sort"}
    with Called() as called, torch.no_grad():
        functional.cosine_softmax(*problem[:3])
    assert not called.names & {"aten::_softmax", "aten::mm", "aten::exp"}
    keys = problem.keys.clone().requires_grad_()
    with Called() as called:
        functional.cosine_softmax(keys, *problem[1:3])[0, 0].backward()
    assert "dan_fast::slot_softmax_backward" in called.names and "aten::_softmax" not in called.names
    with _extension.disabled(), Called() as called:
        plain = with_gradients(functional.cosine_softmax, problem)
        plain_sets = functional.false_sample_sets(evaluation, labels, pseudo_labels)
    assert not [name for name in called.names if name.startswith("dan_fast")]
    agree(found, plain, 1e-10)
    assert all(map(torch.equal, sets, plain_sets))


@needs_extension
def test_the_operators_name_what_does_not_fit():
    ops, (*tensors, occupied) = torch.ops.dan_fast, operands(F64)
    for wrong, message in (
        ((tensors[0].half(), *tensors[1:], occupied), "scores must be float32 or float64"),
        ((tensors[0], tensors[1][1:], tensors[2], occupied), r"square_norms must be \(s,\) = \(33\), got \(32\)"),
        ((*tensors[:2], tensors[2].float(), occupied), "key_squares must be float64, got float32"),
        ((*tensors, occupied[1:]), r"occupied must be \(s,\) = \(33\), got \(32\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.slot_softmax(*wrong)


@pytest.mark.compile
def test_compiled_whole_with_gradients():
    problem = weights(65)

    def loss(keys: Tensor, slots: Tensor, occupied: Tensor | None) -> tuple[Tensor, ...]:
        result = functional.cosine_softmax(keys, slots, occupied)
        sets = functional.false_sample_sets(result, torch.arange(65) % 3 - 1, torch.arange(5) % 2)
        return (result * problem.factors).sum(), result, *sets

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for function in (loss, compiled):
        keys, slots = (x.detach().clone().requires_grad_() for x in problem[:2])
        total, *rest = function(keys, slots, problem.occupied)
        found.append((*rest, *torch.autograd.grad(total, [keys, slots])))
    assert all(map(torch.equal, *found))
    smaller = problem.keys[:3], problem.slots[:4], problem.occupied[:4]  # sizes that are free by now
    softmax = torch.compile(functional.cosine_softmax, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.allclose(softmax(*smaller), functional.cosine_softmax(*smaller), rtol=1e-12)
    # What an eager call refuses, a compiled one cannot look at: it shows in the row of that key, and only there.
    for bad in (math.nan, math.inf, 1e200):
        keys = problem.keys.clone()
        keys[1, 0] = bad
        with pytest.raises(ValueError, match="^keys must be finite"):
            functional.cosine_softmax(keys, *problem[1:3])
        result = compiled(keys, *problem[1:3])[1]
        assert result[1, problem.occupied].isnan().all() and not result[1, ~problem.occupied].any()
        others = [0, 2, 3, 4]
        assert torch.equal(result[others], found[0][0][others])
        with _extension.disabled():
            plain = functional.memory.softmax.SlotSoftmax.run(
                keys @ problem.slots.mT, row_sq_norms(problem.slots), row_sq_norms(keys), problem.occupied
            )
        assert torch.equal(plain.isnan(), result.isnan())


@needs_extension
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_bits_do_not_depend_on_the_run_the_threads_or_the_batch(dtype: torch.dtype):
    ops = torch.ops.dan_fast
    *tensors, occupied = operands(dtype, batch=40, slots=1700)
    grad, labels, pseudo_labels = tensors[0].sin(), torch.arange(1700) % 60 - 1, torch.arange(40) % 50

    def everything(rows: slice = slice(None)) -> list[Tensor]:
        scores, norms, squares = tensors[0][rows], tensors[1], tensors[2][rows]
        result = ops.slot_softmax(scores, norms, squares, occupied)
        backward = ops.slot_softmax_backward(grad[rows], result, scores, norms, squares)
        return [result, *backward, *ops.false_sample_sets(result, labels, pseudo_labels[rows])]

    found = by_threads(everything)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])
    alone = everything(slice(7, 8))
    for k in (0, 1, 3, 4, 5):  # all but the gradient of the norms, a sum over rows
        assert torch.equal(alone[k], found[0][k][7:8])


@pytest.mark.gpu
@pytest.mark.parametrize("slots", SIZES)
def test_on_the_gpu(slots: int):
    problem = weights(slots)
    on_gpu = Weights(*(None if x is None else x.cuda() for x in problem))
    with Called() as called:
        found = with_gradients(functional.cosine_softmax, on_gpu)
    assert ("dan_fast::slot_softmax" in called.names) == (_extension.why_not_on("cuda") is None)
    for a, b in zip(found, with_gradients(reference.cosine_softmax, problem), strict=True):
        agree(a.cpu(), b, 1e-10)
    assert torch.equal(found[0], functional.cosine_softmax(*on_gpu[:3]))
