"""The operators under `torch.func`: kernels have no rule for its transforms, so the PyTorch forms serve there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, vmap
from torch._subclasses import FakeTensorMode
from torch.func import grad, jacrev, jvp, linearize, vjp

from dan_fast import MemoryState, NLCBAMWeights
from dan_fast.functional import (
    attention_adversary,
    attention_head,
    cosine_softmax,
    discriminative_loss,
    memory_step,
    mix_styles,
    nl_cbam,
)
from dan_fast.nn import ProgressiveAugmentedMemory
from tests.support.draws import draw

LABELS = torch.tensor([0, 1, 1])
CLASSES = torch.tensor([1, -1, 3])
KEYS, SLOTS, MAPS, CAM = draw(3, 4), draw(5, 4, seed=1), draw(3, 3, 2, 2, seed=2), draw(4, 3, seed=3)
SLOT_LABELS = torch.tensor([0, 1, 2, 1, -1])
SHAPES = [(1, 3), (3, 1), (1, 4), (1, 4), (4, 1), (4, 1)]
WEIGHTS = NLCBAMWeights(*(draw(*shape, seed=seed) for seed, shape in enumerate(SHAPES)))


def flat(values: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def step(keys: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    memory = MemoryState.empty(5, 4, dtype=dtype)._replace(features=SLOTS.to(dtype), labels=SLOT_LABELS)
    keys = keys.to(dtype)
    return memory_step(memory, memory, keys, LABELS, keys.sin(), torch.arange(3), 0.1, 0.1, 0.2).loss[None]


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "cosine_softmax": (lambda x: cosine_softmax(x, SLOTS, SLOT_LABELS >= 0).flatten(), KEYS),
    "cosine_softmax in double": (lambda x: cosine_softmax(x, SLOTS.double()).flatten(), KEYS.double()),
    "cosine_softmax of slots": (lambda x: cosine_softmax(KEYS, x).flatten(), SLOTS),
    "discriminative_loss": (lambda x: discriminative_loss(x, LABELS, SLOTS, SLOT_LABELS, 0.5), KEYS),
    "discriminative_loss in double": (
        lambda x: discriminative_loss(x, LABELS, SLOTS.double(), SLOT_LABELS, 0.5),
        KEYS.double(),
    ),
    "attention_head": (lambda x: flat(attention_head(x, WEIGHTS, CAM, CLASSES)), MAPS),
    "attention_head of its weights": (
        lambda x: flat(attention_head(MAPS, WEIGHTS._replace(wc1=x), CAM, CLASSES)),
        WEIGHTS.wc1,
    ),
    "nl_cbam": (lambda x: flat(nl_cbam(x, WEIGHTS)), MAPS),
    "attention_adversary": (lambda x: flat(attention_adversary(x, x.sigmoid(), CAM, CLASSES)), MAPS),
    "mix_styles": (lambda x: mix_styles(x, torch.tensor([2, 0, 1]), torch.full((3,), 0.3)).square().flatten(), MAPS),
    "memory_step": (step, KEYS),
    "memory_step in double": (lambda x: step(x, torch.float64), KEYS.double()),
    "memory_step in half precision": (lambda x: step(x, torch.bfloat16), KEYS),
}
BATCHED = [name for name in FUNCTIONS if not name.startswith("memory_step")]


def slopes(values: Tensor) -> Tensor:
    return torch.linspace(-1, 1, values.numel(), dtype=values.dtype) + 0.1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_find_what_autograd_finds(name: str):
    function, x = FUNCTIONS[name]

    def loss(y: Tensor) -> Tensor:
        values = function(y)
        return (values * slopes(values)).sum()

    def slope(y: Tensor) -> Tensor:
        return grad(loss)(y).sin().sum()

    leaf, along = x.clone().requires_grad_(), x.cos()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), leaf, retain_graph=True)
    (moved,) = torch.autograd.grad((first * along).sum(), leaf)
    assert first.abs().max() > 1e-3
    values, pull = vjp(function, x)
    rows = jacrev(function)(x).flatten(1)
    rounding = 2e-2 if "half" in name else 1e-9 if "double" in name else 1e-4
    for gradient in (grad(loss)(x), pull(slopes(values))[0], (slopes(values).to(rows.dtype) @ rows).view_as(x)):
        torch.testing.assert_close(gradient, first.detach(), rtol=rounding, atol=rounding * first.abs().max().item())
    torch.testing.assert_close(grad(slope)(x), second, rtol=10 * rounding, atol=rounding * second.abs().max().item())
    slope_along = jvp(loss, (x,), (along,))[1].to(x.dtype)
    torch.testing.assert_close(slope_along, (first * along).sum().detach(), rtol=rounding, atol=rounding)
    of_gradient = jvp(grad(loss), (x,), (along,))[1]
    torch.testing.assert_close(of_gradient, moved, rtol=10 * rounding, atol=rounding * moved.abs().max().item())


@pytest.mark.parametrize("name", BATCHED)
def test_a_vmap_is_a_loop(name: str):
    function, x = FUNCTIONS[name]
    batch = torch.stack([x, x.cos(), x * 2])
    torch.testing.assert_close(vmap(function)(batch), torch.stack([function(each) for each in batch]))
    per_sample = vmap(grad(lambda y: function(y).square().sum()))(batch)
    looped = torch.stack([grad(lambda y: function(y).square().sum())(each) for each in batch])
    torch.testing.assert_close(per_sample, looped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_that_are_not_there_are_not_looked_at(name: str):
    function, x = FUNCTIONS[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = function(mode.from_tensor(x))
    assert found.shape == function(x).shape
    values, slope = linearize(function, x)
    torch.testing.assert_close(values, function(x))
    torch.testing.assert_close(slope(x.cos()), jvp(function, (x,), (x.cos(),))[1])


def test_labels_are_not_looked_at_in_a_vmap():
    losses = vmap(lambda labels: attention_head(MAPS, WEIGHTS, CAM, labels).adversary_loss)(torch.stack([CLASSES] * 2))
    torch.testing.assert_close(losses, attention_head(MAPS, WEIGHTS, CAM, CLASSES).adversary_loss.expand(2, -1))


def test_what_is_looked_at_is_refused_in_a_gradient_too():
    with pytest.raises(ValueError, match="keys must be finite"):
        grad(lambda x: cosine_softmax(x, SLOTS).sum())(KEYS * torch.inf)


def test_a_memory_step_in_a_vmap_is_one_sentence():
    with pytest.raises(NotImplementedError, match="call memory_step in a loop"):
        vmap(step)(torch.stack([KEYS] * 2))


def test_a_memory_that_advances_is_refused_and_stays_as_it_was():
    memory = ProgressiveAugmentedMemory(5, 5, 4)
    ids = torch.arange(3)
    memory(KEYS, LABELS, KEYS, ids)
    before = [x.clone() for x in memory.labeled]
    with pytest.raises(NotImplementedError, match="take functional.memory_step"):
        grad(lambda x: memory(x, LABELS, x, ids).loss)(KEYS)
    assert all(map(torch.equal, before, memory.labeled))
    # To read M alone is no step.
    found = grad(lambda x: memory.labeled_loss(x, LABELS, 0.5).sum())(KEYS)
    leaf = KEYS.clone().requires_grad_()
    memory.labeled_loss(leaf, LABELS, 0.5).sum().backward()
    torch.testing.assert_close(found, leaf.grad)
    memory(leaf, LABELS, leaf, ids).loss.backward()
