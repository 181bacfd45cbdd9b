"""Pseudo-label accuracy and purity on memories small enough to count by hand."""

from types import SimpleNamespace

import pytest
import torch

from dan_fast import MemoryState
from dan_fast.training.metrics import accuracy, pseudo_label_accuracy, pseudo_label_purity

# Six unlabelled images: persons 0, 0, 1, 1, 2 and one unknown; the first three persons' classes are 4, 7 and none.
TRUTH = SimpleNamespace(true_ids=torch.tensor([0, 0, 1, 1, 2, -1]), true_labels=torch.tensor([4, 4, 7, 7, -1, -1]))


def memory(labels: list[int], sample_ids: list[int]) -> MemoryState:
    state = MemoryState.empty(len(labels), 2)
    return state._replace(labels=torch.tensor(labels), sample_ids=torch.tensor(sample_ids))


@pytest.mark.parametrize(
    ("labels", "sample_ids", "purity"),
    [
        # Both of a label show one person.
        ([5, 5], [0, 1], 1.0),
        ([5, 5], [0, 2], 0.0),
        # Of three under one label the two of person 0 have one right companion of two, the third none.
        ([5, 5, 5], [0, 1, 2], (0.5 + 0.5 + 0.0) / 3),
        # An image alone under its label has no companion and does not count; nor does an empty slot.
        ([5, 5, 6, -1], [0, 1, 2, -1], 1.0),
        # An image in two slots is no companion of itself.
        ([5, 5, 5], [0, 0, 2], 0.0),
        # The same person under two labels, each beside someone else.
        ([5, 5, 6, 6], [0, 2, 1, 3], 0.0),
        # An image of unknown identity says nothing either way.
        ([5, 5, 5], [0, 1, 5], 1.0),
        ([5, 6], [0, 1], None),
        ([5, 5], [5, 5], None),
        ([-1, -1], [-1, -1], None),
    ],
)
def test_purity_is_the_share_of_right_companions(labels, sample_ids, purity):
    measured = pseudo_label_purity(memory(labels, sample_ids), TRUTH)
    assert measured == (None if purity is None else pytest.approx(purity))


def test_pseudo_label_accuracy_counts_images_of_labelled_persons_only():
    def record(sample_ids, pseudo_labels):
        return SimpleNamespace(sample_ids=torch.tensor(sample_ids), pseudo_labels=torch.tensor(pseudo_labels))

    assert pseudo_label_accuracy(record([0, 2, 3, 4, 5], [4, 4, 7, 1, 1]), TRUTH) == pytest.approx(2 / 3)
    # A skipped sample has no pseudo label; persons without a class have no right one.
    assert pseudo_label_accuracy(record([0, 1], [-1, 4]), TRUTH) == 1.0
    assert pseudo_label_accuracy(record([4, 5], [1, 2]), TRUTH) is None


def test_accuracy_is_the_share_of_right_classes():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 0.0]])
    assert float(accuracy(logits, torch.tensor([0, 1, 1, 0]))) == 0.75
