"""Batch plans: sizes, halves, same classes, passes, determinism."""

from collections import Counter
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.data import BatchPlan, BatchPlanner, PlannedItem
from dan_fast.data.sampler import Kind
from dan_fast.data.shares import share_of
from tests.support.examples import examples

LABELS = torch.arange(200) % 50


def feedback(count: int = 30) -> tuple[Tensor, Tensor]:
    return torch.arange(count) * 3, (torch.arange(count) * 7) % 50


def of_kind(items: tuple[PlannedItem, ...], kind: str) -> list[PlannedItem]:
    return [item for item in items if item.kind == kind]


def counts(items: tuple[PlannedItem, ...]) -> tuple[int, int, int]:
    return tuple(len(of_kind(items, kind)) for kind in ("labeled", "fed_back", "unlabeled"))


def indices(plans: list[BatchPlan], kind: str) -> list[int]:
    return [item.index for plan in plans for part in plan if part for item in of_kind(part, kind)]


def test_halves_and_shares_of_the_default_batch() -> None:
    planner = BatchPlanner(LABELS, num_unlabeled=100)
    plans = planner.plan_epoch(0)
    assert len(plans) == planner.iterations == 200 // 32
    assert {counts(part) for plan in plans for part in plan} == {(16, 0, 16)}
    plans = planner.plan_epoch(0, feedback())
    assert len(plans) == 200 // 32
    assert {counts(plan.meta_train) for plan in plans} == {(16, 0, 16)}
    assert {counts(plan.meta_test) for plan in plans} == {(8, 8, 16)}


def test_items_say_what_they_are() -> None:
    ids, pseudo = feedback()
    known = dict(zip(ids.tolist(), pseudo.tolist(), strict=True))
    for plan in BatchPlanner(LABELS, 100).plan_epoch(2, (ids, pseudo)):
        for part in plan:
            order = [("labeled", "fed_back", "unlabeled").index(item.kind) for item in part]
            assert order == sorted(order)
            assert all(item.label == LABELS[item.index] for item in of_kind(part, "labeled"))
            assert all(item.label == known[item.index] for item in of_kind(part, "fed_back"))
            assert all(item.label == -1 and 0 <= item.index < 100 for item in of_kind(part, "unlabeled"))
            assert all(0 <= item.seed < 2**31 for item in part)


def test_each_fed_back_sample_has_a_labelled_partner_of_its_class_in_meta_train() -> None:
    # 400 classes for 16 labelled places: a partner is hardly ever there by accident.
    labels = torch.arange(800) % 400
    ids, pseudo = torch.arange(90), torch.arange(90) * 4
    partners = []
    for plan in BatchPlanner(labels, 100).plan_epoch(0, (ids, pseudo)):
        wanted = Counter(item.label for item in plan.meta_test if item.kind == "fed_back")
        there = Counter(item.label for item in plan.meta_train if item.kind == "labeled")
        assert wanted.total() == 8 and wanted <= there
        partners += [item.index for item in plan.meta_train[:8]]
    # Either image of a class is drawn now and then.
    assert {index >= 400 for index in partners} == {True, False}


def test_all_fed_back_samples_take_their_turn() -> None:
    seen = indices(BatchPlanner(LABELS, 100).plan_epoch(0, feedback(24)), "fed_back")
    first, second = seen[:24], seen[24:]
    assert sorted(first) == sorted(second) == feedback(24)[0].tolist() and first != second


def test_fewer_fed_back_samples_than_places_appear_once_a_batch() -> None:
    for plan in BatchPlanner(LABELS, 100).plan_epoch(0, feedback(3)):
        assert sorted(item.index for item in of_kind(plan.meta_test, "fed_back")) == [0, 3, 6]
        assert counts(plan.meta_test) == (13, 3, 16)


def test_the_largest_share_of_fed_back_samples() -> None:
    def shares(fraction: float) -> tuple[int, int, int]:
        return counts(BatchPlanner(LABELS, 100, feedback_fraction=fraction).plan_epoch(0, feedback())[0].meta_test)

    assert shares(0.0) == (16, 0, 16) and shares(1.0) == (0, 16, 16) and shares(0.3) == (12, 4, 16)


def test_an_epoch_is_one_pass_through_the_labelled_images() -> None:
    planner = BatchPlanner(torch.arange(192) % 50, 100)
    for epoch in range(3):
        assert sorted(indices(planner.plan_epoch(epoch), "labeled")) == list(range(192))
    assert indices(planner.plan_epoch(0), "labeled") != indices(planner.plan_epoch(1), "labeled")


def test_the_unlabelled_pass_goes_on_from_epoch_to_epoch() -> None:
    planner = BatchPlanner(torch.arange(64) % 8, num_unlabeled=96)  # 64 unlabelled places an epoch
    stream = [index for epoch in range(3) for index in indices(planner.plan_epoch(epoch), "unlabeled")]
    first, second = stream[:96], stream[96:]
    assert sorted(first) == sorted(second) == list(range(96))
    assert first != second and first != sorted(first)


def test_without_unlabelled_images_all_places_are_labelled() -> None:
    plans = BatchPlanner(LABELS, num_unlabeled=0).plan_epoch(0)
    assert len(plans) == 200 // 64
    assert {counts(part) for plan in plans for part in plan} == {(32, 0, 0)}


def test_fewer_labelled_images_than_places_repeat() -> None:
    plans = BatchPlanner(torch.tensor([0, 1, 2]), num_unlabeled=2).plan_epoch(0)
    assert len(plans) == 1
    assert set(Counter(indices(plans, "labeled")).values()) == {10, 11}
    assert Counter(indices(plans, "unlabeled")) == {0: 16, 1: 16}


def test_without_split_one_part_holds_the_same_samples() -> None:
    split = BatchPlanner(LABELS, 100, split=True).plan_epoch(1, feedback())
    whole = BatchPlanner(LABELS, 100, split=False).plan_epoch(1, feedback())
    assert all(plan.meta_test is None for plan in whole)
    for one, two in zip(whole, split, strict=True):
        assert counts(one.meta_train) == (24, 8, 32)
        assert sorted(one.meta_train) == sorted(two.meta_train + two.meta_test)
        assert [item.kind for item in one.meta_train] == ["labeled"] * 24 + ["fed_back"] * 8 + ["unlabeled"] * 32


def test_the_same_arguments_give_the_same_plan_whatever_was_planned_before() -> None:
    planner = BatchPlanner(LABELS, 100, seed=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    plan = planner.plan_epoch(3, feedback())
    assert torch.equal(torch.get_rng_state(), before)
    planner.plan_epoch(4)
    torch.manual_seed(2)
    assert planner.plan_epoch(3, feedback()) == plan
    assert BatchPlanner(LABELS.clone(), 100, seed=5).plan_epoch(3, feedback()) == plan
    seeds = [item.seed for batch in plan for part in batch for item in part]
    assert len(set(seeds)) == len(seeds)
    for other in (planner.plan_epoch(4, feedback()), BatchPlanner(LABELS, 100, seed=6).plan_epoch(3, feedback())):
        assert all(a.meta_train != b.meta_train for a, b in zip(plan, other, strict=True))


def test_a_plan_is_the_same_on_every_machine() -> None:
    planner = BatchPlanner(torch.tensor([0, 0, 1, 1]), num_unlabeled=3, batch_size=4, seed=7)
    plan = planner.plan_epoch(1, (torch.tensor([2]), torch.tensor([1])))
    # Pinned: a checkpoint resumes on another machine only if this never changes.
    assert plan[0].meta_train == (("labeled", 0, 0, 192003983), ("unlabeled", 0, -1, 1725426827))


@examples(60)
@given(
    labeled=st.integers(1, 40),
    unlabeled=st.integers(0, 30),
    batch_size=st.integers(2, 20),
    unlabeled_fraction=st.floats(0.0, 0.99),
    feedback_fraction=st.floats(0.0, 1.0),
    fed_back=st.integers(0, 10),
    epoch=st.integers(0, 5),
)
def test_any_sizes(labeled, unlabeled, batch_size, unlabeled_fraction, feedback_fraction, fed_back, epoch) -> None:
    labels = torch.arange(labeled) // 2
    planner = BatchPlanner(labels, unlabeled, batch_size, unlabeled_fraction, feedback_fraction)
    fed_back = min(fed_back, unlabeled)
    plans = planner.plan_epoch(epoch, (torch.arange(fed_back), torch.arange(fed_back) % (labels.max() + 1)))
    assert len(plans) == planner.iterations >= 1
    for plan in plans:
        assert len(plan.meta_train) == batch_size - batch_size // 2 and len(plan.meta_test) == batch_size // 2
        assert counts(plan.meta_train)[0] >= 1 and sum(counts(plan.meta_test)[:2]) >= 1
        assert all(item.label == labels[item.index] for item in plan.meta_train if item.kind == "labeled")
        wanted = Counter(item.label for item in plan.meta_test if item.kind == "fed_back")
        assert wanted <= Counter(item.label for item in plan.meta_train if item.kind == "labeled")
        # The ranks' shares are the plan, kind by kind, and as even as can be.
        shares = [share_of(plan, rank, 3) for rank in range(3)]
        for part, of_ranks in zip(plan, zip(*shares, strict=True), strict=True):
            joined = [item for kind in get_args(Kind) for share in of_ranks for item in of_kind(share, kind)]
            assert tuple(joined) == part and max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 1}, "batch size is 1; it must be 2 or more, one image each for S and S~."),
        ({"batch_size": 1, "split": False}, "batch size is 1; it must be 2 or more."),
        ({"unlabeled_fraction": 1.0}, "unlabelled fraction is 1.0"),
        ({"unlabeled_fraction": -0.1}, "unlabelled fraction is -0.1"),
        ({"feedback_fraction": 1.1}, "feedback fraction is 1.1"),
        ({"feedback_fraction": float("nan")}, "feedback fraction is nan"),
    ],
)
def test_wrong_settings(options: dict, expected: str) -> None:
    with pytest.raises(DanFastError, match=expected):
        BatchPlanner(LABELS, 10, **options)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="labels must be"):
        BatchPlanner(torch.empty(0, dtype=torch.int64), 10)
    planner = BatchPlanner(LABELS, 10)
    for ids, pseudo, expected in (
        (torch.tensor([10]), torch.tensor([0]), "sample_ids outside 0..9"),
        (torch.tensor([-1]), torch.tensor([0]), "sample_ids outside 0..9"),
        (torch.tensor([1]), torch.tensor([50]), "no labelled image"),
        (torch.tensor([1, 2]), torch.tensor([0]), r"not \(2,\) and \(1,\)"),
    ):
        with pytest.raises(ValueError, match=expected):
            planner.plan_epoch(0, (ids, pseudo))


def test_an_epoch_has_as_many_iterations_as_it_is_given():
    labels = torch.arange(200) % 10
    short = BatchPlanner(labels, 50, batch_size=16, unlabeled_fraction=0.25, iterations=4)
    assert short.iterations == 4 and len(short.plan_epoch(0)) == 4
    first, second = ({item.index for plan in short.plan_epoch(epoch) for item in plan.meta_train} for epoch in (0, 1))
    assert first != second  # another part of the images each time
    longer = BatchPlanner(labels, 50, batch_size=16, iterations=40).plan_epoch(0)
    seen = Counter(indices(longer, "labeled"))
    assert len(longer) == 40 and len(seen) == 200 and max(seen.values()) <= 2
    with pytest.raises(ValueError, match="iterations must not be negative"):
        BatchPlanner(labels, 50, iterations=-1)
