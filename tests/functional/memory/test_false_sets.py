"""`false_sample_sets`: the sets of a stable sort, in any layout and on any device."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dan_fast import functional, reference
from dan_fast.functional.memory.false_sets import FalseSampleSets
from tests.support.examples import examples
from tests.support.slot_problems import F64, KINDS, SIZES, literal_sets, sets
from tests.support.toolchain import needs_extension

DTYPES = (F64, torch.float32, torch.float16, torch.bfloat16)
SETS = (reference.false_sample_sets, functional.false_sample_sets, FalseSampleSets.form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [0, 1, 63, 1000])
def test_the_sets_are_those_of_a_stable_sort(slots: int, kind: str, dtype: torch.dtype):
    evaluation, labels, pseudo_labels = sets(slots, kind=kind)
    evaluation = evaluation.to(dtype)
    expected = literal_sets(evaluation, labels, pseudo_labels)
    for sets_of in SETS:
        assert all(map(torch.equal, sets_of(evaluation, labels, pseudo_labels), expected)), sets_of.__module__
    assert torch.equal(*(x.sum(1) for x in expected))
    if slots >= 63 and kind != "equal":
        assert expected[0].any()


def test_all_slots_of_the_label_and_all_but_one():
    evaluation = torch.tensor([[0.4, 0.1, 0.3], [0.1, 0.4, 0.3], [0.4, 0.1, 0.3]])
    found = functional.false_sample_sets(evaluation, torch.tensor([0, 1, 1]), torch.tensor([1, 1, 0]))
    assert found[0].int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert found[1].int().tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    for labels in ([1, 1, 1], [-1, 1, 1]):
        found = functional.false_sample_sets(evaluation, torch.tensor(labels), torch.tensor([1, 1, 1]))
        assert not found[0].any() and not found[1].any()


@pytest.mark.parametrize("sets_of", SETS, ids=["reference", "functional", "form"])
def test_an_empty_slot_is_below_a_weight_of_minus_infinity(sets_of):
    evaluation = torch.tensor([[0.0, -math.inf, 1.0, -math.inf, -math.inf]])
    found = sets_of(evaluation, torch.tensor([-1, 5, 6, 5, 5]), torch.tensor([5]))
    assert [x.int().tolist() for x in found] == [[[0, 0, 0, 0, 1]], [[0, 0, 1, 0, 0]]]


def test_the_sets_at_the_size_of_the_paper():
    for seed, classes in ((0, 2), (1, 750)):
        problem = sets(9000, batch=3, classes=classes, seed=seed, kind="close")
        found, expected = functional.false_sample_sets(*problem), literal_sets(*problem)
        assert all(map(torch.equal, found, expected)) and expected[0].any()


@examples(60)
@given(data=st.data(), slots=st.integers(1, 30), dtype=st.sampled_from([F64, torch.float32, torch.float16]))
def test_any_sets(data: st.DataObject, slots: int, dtype: torch.dtype):
    number = st.floats(width=16) | st.sampled_from([0.0, -0.0, 0.5, math.nan, -math.inf])
    evaluation = torch.tensor([data.draw(st.lists(number, min_size=slots, max_size=slots))], dtype=dtype)
    labels = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=slots, max_size=slots)))
    pseudo_labels = torch.tensor([data.draw(st.integers(-2, 3))])
    wanted, *found = (sets_of(evaluation, labels, pseudo_labels) for sets_of in SETS)
    assert all(torch.equal(a, b) for got in found for a, b in zip(got, wanted, strict=True))
    assert wanted[0].sum() == wanted[1].sum()


def test_no_gradient_comes_out_of_the_sets():
    evaluation, labels, pseudo_labels = sets(20)
    found = functional.false_sample_sets(evaluation.requires_grad_(), labels, pseudo_labels)
    assert not any(x.requires_grad for x in found) and all(x.dtype == torch.bool for x in found)


@needs_extension
def test_the_operator_names_a_wrong_argument():
    with pytest.raises(RuntimeError, match="evaluation must be float64, float32, bfloat16 or float16"):
        torch.ops.dan_fast.false_sample_sets(torch.ones(1, 2).long(), torch.tensor([0, 1]), torch.tensor([0]))


@pytest.mark.gpu
@pytest.mark.parametrize("slots", SIZES)
def test_on_the_gpu(slots: int):
    for kind in KINDS:
        for dtype in DTYPES:
            evaluation, labels, pseudo_labels = sets(slots, kind=kind)
            given = (evaluation.to(dtype), labels, pseudo_labels)
            expected = reference.false_sample_sets(*given)
            actual = functional.false_sample_sets(*(x.cuda() for x in given))
            assert all(torch.equal(a.cpu(), b) for a, b in zip(actual, expected, strict=True))
