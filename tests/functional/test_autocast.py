"""Operators and their backward passes inside autocast: the bits are those outside, whatever path serves."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from dan_fast import MemoryState, functional
from dan_fast.core.types import MemoryStep
from dan_fast.functional.products import Float32Product
from tests.support.attention_problems import OPERATORS, call, flat_arguments, floating, mixture
from tests.support.attention_problems import problem as attention_problem
from tests.support.draws import draw
from tests.support.toolchain import needs_extension

LABELS, SLOTS = torch.arange(40) % 5, draw(40, 64, seed=1)


def step_of(keys: Tensor, unlabeled_keys: Tensor) -> MemoryStep:
    usage, evaluation = draw(40, seed=0).abs(), torch.full((40,), 1 / 40)
    memory = MemoryState(SLOTS, LABELS, usage, evaluation, torch.tensor(0), torch.arange(40))
    return functional.memory_step(memory, memory, keys, LABELS[:8], unlabeled_keys, torch.arange(8), 0.5, 0.5, 0.3)


def step() -> tuple[Tensor, list[Tensor]]:
    keys = [draw(8, 64, seed=seed).requires_grad_() for seed in (2, 3)]
    return step_of(*keys).loss, keys


def attention() -> tuple[Tensor, list[Tensor]]:
    inputs = [draw(8, 64, seed=4).requires_grad_(), draw(40, 64, seed=5).requires_grad_()]
    return (functional.cosine_softmax(*inputs) * draw(8, 40, seed=6)).sum(), inputs


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("problem", [step, attention])
def test_gradients_have_the_bits_of_a_backward_pass_outside(problem, create_graph: bool):
    found = []
    for within in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        loss, inputs = problem()
        with within:
            found.append(first := torch.autograd.grad(loss, inputs, create_graph=create_graph))
            if create_graph:
                found[-1] += torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
    assert all(map(torch.equal, *found))


OF_KEYS = {
    "cosine_softmax": lambda keys: [functional.cosine_softmax(keys, SLOTS)],
    "discriminative_loss": lambda keys: [functional.discriminative_loss(keys, LABELS[:8], SLOTS, LABELS, 0.05)],
    "memory_step": lambda keys: [(step := step_of(keys, keys.flip(0))).loss, *step.labeled, *step.unlabeled],
}


@pytest.mark.parametrize("name", OF_KEYS)
def test_keys_are_taken_to_the_dtype_of_the_slots_and_not_rounded(name: str):
    def found(keys: Tensor) -> list[Tensor]:
        values = OF_KEYS[name](keys)
        return [*values, *torch.autograd.grad(values[0].square().sum(), keys)]

    keys = draw(8, 64, seed=2).requires_grad_()
    expected = found(keys)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, found(keys), expected))
        low = torch.nn.Linear(64, 64)(keys).detach().requires_grad_()
        of_low, *_ = found(low)
    assert low.dtype == torch.bfloat16 and torch.equal(of_low, OF_KEYS[name](low.float())[0])


def test_slots_and_keys_that_are_none_are_named_within():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="slots must be a tensor"):
        functional.discriminative_loss(SLOTS[:8].bfloat16(), LABELS[:8], None, LABELS, 0.05)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="keys must have a floating dtype"):
        functional.cosine_softmax(SLOTS[:8].long(), SLOTS)


@needs_extension
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_attention_by_kernels(name: str, create_graph: bool):
    inputs = flat_arguments(name, *attention_problem((4, 6, 3, 2), hidden=(3, 2), classes=3, dtype=torch.float32))
    value = mixture(call(functional, name, *inputs))
    outside = torch.autograd.grad(value, floating(inputs), retain_graph=True, create_graph=create_graph)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(value, floating(inputs), create_graph=create_graph)
    assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize("addend", [None, torch.ones(4, 3)])
def test_a_product_is_in_float32_within(addend: Tensor | None):
    left, right = draw(4, 8, seed=0), draw(8, 3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        result = Float32Product.op(left, right, addend)
    assert result.dtype == torch.float32 and torch.equal(result, Float32Product.op(left, right, addend))
