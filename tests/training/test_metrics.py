"""Pseudo-label accuracy and purity on memories small enough to count by hand, and the means over a window."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dan_fast.data import ReIDDataset
from dan_fast.training.metrics import (
    cleared_a_sample,
    fed_back_right,
    logit_norm,
    pseudo_label_accuracy,
    pseudo_label_purity,
)
from dan_fast.training.objective import spatial_spread
from dan_fast.training.scalars import Scalars, target_tags

# Six unlabelled images: persons 0, 0, 1, 1, 2 and one unknown; the first three persons' classes are 4, 7 and none.
TRUTH = SimpleNamespace(true_ids=torch.tensor([0, 0, 1, 1, 2, -1]), true_labels=torch.tensor([4, 4, 7, 7, -1, -1]))


@pytest.mark.parametrize(
    ("labels", "sample_ids", "purity"),
    [
        # Both of a label show one person.
        ([5, 5], [0, 1], 1.0),
        ([5, 5], [0, 2], 0.0),
        # Of three under one label the two of person 0 have one right companion of two, the third none.
        ([5, 5, 5], [0, 1, 2], (0.5 + 0.5 + 0.0) / 3),
        # An image alone under its label has no companion and does not count.
        ([5, 5, 6], [0, 1, 2], 1.0),
        # The same person under two labels, each beside someone else.
        ([5, 5, 6, 6], [0, 2, 1, 3], 0.0),
        # An image of unknown identity says nothing either way.
        ([5, 5, 5], [0, 1, 5], 1.0),
        ([5, 6], [0, 1], None),
        ([5], [5], None),
        ([], [], None),
    ],
)
def test_purity_is_the_share_of_right_companions(labels, sample_ids, purity):
    ids, given = (torch.tensor(each, dtype=torch.int64) for each in (sample_ids, labels))
    measured = pseudo_label_purity(ids, given, TRUTH)
    assert measured == (None if purity is None else pytest.approx(purity))


def test_pseudo_label_accuracy_counts_images_of_labelled_persons_only():
    def measured(sample_ids, pseudo_labels):
        ids, labels = (torch.tensor(each, dtype=torch.int64) for each in (sample_ids, pseudo_labels))
        share, known = pseudo_label_accuracy(SimpleNamespace(sample_ids=ids, pseudo_labels=labels), TRUTH.true_labels)
        return float(share), bool(known)

    assert measured([0, 2, 3, 4, 5], [4, 4, 7, 1, 1]) == (pytest.approx(2 / 3), True)
    # A skipped sample has no pseudo label; persons without a class have no right one.
    assert measured([0, 1], [-1, 4]) == (1.0, True)
    assert measured([4, 4], [-1, 1]) == (0.0, False)
    assert measured([], []) == (0.0, False)


@pytest.mark.parametrize(
    ("fed_back", "share"),
    [
        # Two of three labelled persons' images carry their class.
        ([(0, 4), (2, 4), (3, 7)], 2 / 3),
        # A person without a class cannot be right, and counts; an image of unknown identity does not.
        ([(0, 4), (4, 5)], 1 / 2),
        ([(0, 4), (5, 5)], 1.0),
        ([(4, 5), (4, 0)], 0.0),
        ([(5, 5)], None),
        ([], None),
    ],
)
def test_fed_back_images_of_known_persons_are_right_or_wrong(fed_back, share):
    ids, labels = torch.tensor(fed_back, dtype=torch.int64).reshape(-1, 2).unbind(1)
    record = SimpleNamespace(fed_back_ids=ids, fed_back_labels=labels)
    value, counts = fed_back_right(record, TRUTH.true_labels, TRUTH.true_ids)
    assert value.shape == counts.shape == () and bool(counts) == (share is not None)
    assert float(value) == pytest.approx(share or 0.0)


def test_what_left_the_memory_is_counted_a_sample_written():
    def measured(cleared, pseudo_labels):
        record = SimpleNamespace(cleared=torch.tensor(cleared), pseudo_labels=torch.tensor(pseudo_labels).long())
        value, counts = cleared_a_sample(record)
        return float(value), bool(counts)

    assert measured(6, [3, -1, 0, 3, 1]) == (1.5, True)  # a skipped sample is not written
    assert measured(0, [0]) == (0.0, True)
    assert measured(0, [-1, -1]) == measured(0, []) == (0.0, False)


def test_the_logit_norm_is_the_mean_over_samples():
    assert float(logit_norm(torch.tensor([[3.0, -4.0], [0.0, 0.0], [0.0, 1.0]]))) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_spread_is_each_images_own(dtype):
    attention = torch.tensor([[0.5, 0.75, 0.25], [0.5, 0.5, 0.5], [1.0, 0.875, 1.0]], dtype=dtype)
    spread = spatial_spread(attention)
    assert spread.dtype == torch.float32 and spread.shape == ()
    assert float(spread) == pytest.approx((0.5 + 0.0 + 0.125) / 3)


def test_a_window_means_what_counts_and_forgets_it(tmp_path):
    scalars = Scalars(tmp_path)
    for value, counts in ((0.25, True), (0.75, torch.tensor(True)), (9.0, torch.tensor(False))):
        scalars.add("pseudo/accuracy", torch.tensor(value), counts)
    scalars.add("memory/slots_labeled", torch.tensor(7))
    scalars.add("train/step_size", 0.5)
    scalars.add("pseudo/purity", torch.tensor(1.0), torch.tensor(False))
    assert scalars.flush(1) == {"pseudo/accuracy": 0.5, "memory/slots_labeled": 7.0, "train/step_size": 0.5}
    assert scalars.flush(2) == {}
    scalars.close()


def test_no_two_targets_have_one_tag():
    """By which their figures would be averaged."""
    titles = [("mall-2", ""), ("mall", ""), ("mall", "V1"), ("mall", "V1"), ("mall-V1-2", "")]
    tags = target_tags([ReIDDataset(name, Path(name), variant=variant) for name, variant in titles])
    assert tags == ["mall-2", "mall", "mall-V1", "mall-V1-2", "mall-V1-2-2"]
