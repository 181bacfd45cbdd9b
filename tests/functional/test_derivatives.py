"""First and second gradients where the arguments of an operator are made from one another."""

import pytest
import torch

from dan_fast import MemoryState, NLCBAMWeights, functional, reference


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def slope(x):
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)


def same_keys_and_slots(form, x):
    return form.cosine_softmax(x, x)


def slots_of_keys(form, x):
    return form.cosine_softmax(x, x.tanh() + 0.5)


def classifier_of_the_map(form, x):
    features = x.reshape(2, 3, 2, 2)
    weights = NLCBAMWeights(*(draw(*s, seed=i) for i, s in enumerate([(2, 3), (3, 2), (1, 4), (1, 4), (4, 1), (4, 1)])))
    cam_weight = features.mean((2, 3)).tanh()
    return torch.cat([y.flatten() for y in form.attention_head(features, weights, cam_weight, torch.tensor([1, 0]))])


def attention_of_its_result(form, x):
    features = x.reshape(2, 3, 2, 2)
    output = form.attention_adversary(features, features * features.sigmoid(), draw(4, 3), torch.tensor([3, -1]))
    return torch.cat([y.flatten() for y in output])


def unlabelled_keys_of_keys(form, x):
    keys = x.reshape(4, 6)
    labels = torch.arange(5) % 3
    states = [
        MemoryState(draw(5, 6, seed=s), labels, draw(5).abs(), draw(5).softmax(0), torch.tensor(s), torch.arange(5))
        for s in (1, 2)
    ]
    gates = (keys[0, 0], keys[0, 0] * 2, keys[0, 1].sigmoid())
    step = form.memory_step(*states, keys, torch.arange(4) % 3, keys.tanh(), torch.arange(4) + 9, *gates)
    return step.loss.reshape(1)


CASES = (same_keys_and_slots, slots_of_keys, classifier_of_the_map, attention_of_its_result, unlabelled_keys_of_keys)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_each_argument_has_its_own_share_only(case):
    found = []
    for form in (functional, reference):
        x = draw(4, 6, seed=7).requires_grad_()
        value = case(form, x)
        loss = (value * slope(value.detach())).sum()
        (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad((first * slope(first.detach())).sum(), x)
        found.append((plain, first.detach(), second))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
