"""First and second gradients where the arguments of an operator are made from one another."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from dan_fast import MemoryState, NLCBAMWeights, functional, reference
from dan_fast.functional.derivatives import carry_tangents
from tests.support.attention_problems import assert_agree, two_derivatives
from tests.support.draws import draw

draw = partial(draw, dtype=torch.float64)


def same_keys_and_slots(form, x):
    return [form.cosine_softmax(x, x)]


def slots_of_keys(form, x):
    return [form.cosine_softmax(x, x.tanh() + 0.5)]


def classifier_of_the_map(form, x):
    features = x.reshape(2, 3, 2, 2)
    weights = NLCBAMWeights(*(draw(*s, seed=i) for i, s in enumerate([(2, 3), (3, 2), (1, 4), (1, 4), (4, 1), (4, 1)])))
    cam_weight = features.mean((2, 3)).tanh()
    return form.attention_head(features, weights, cam_weight, torch.tensor([1, 0]))


def attention_of_its_result(form, x):
    features = x.reshape(2, 3, 2, 2)
    return form.attention_adversary(features, features * features.sigmoid(), draw(4, 3), torch.tensor([3, -1]))


def unlabelled_keys_of_keys(form, x):
    keys = x.reshape(4, 6)
    labels = torch.arange(5) % 3
    states = [
        MemoryState(draw(5, 6, seed=s), labels, draw(5).abs(), draw(5).softmax(0), torch.tensor(s), torch.arange(5))
        for s in (1, 2)
    ]
    gates = (keys[0, 0], keys[0, 0] * 2, keys[0, 1].sigmoid())
    return [form.memory_step(*states, keys, torch.arange(4) % 3, keys.tanh(), torch.arange(4) + 9, *gates).loss]


CASES = (same_keys_and_slots, slots_of_keys, classifier_of_the_map, attention_of_its_result, unlabelled_keys_of_keys)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_each_argument_has_its_own_share_only(case):
    found, expected = (two_derivatives(partial(case, form), [draw(4, 6, seed=7)]) for form in (functional, reference))
    assert_agree(found, expected, 1e-9)


def test_one_tangent_among_constants_is_seen():
    constant = torch.ones(2)
    assert not carry_tangents((constant, None))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert carry_tangents((constant, None, dual)) and not carry_tangents((constant, None))
