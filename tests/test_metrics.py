"""Pseudo-label accuracy and purity on memories small enough to count by hand, and the means over a window."""

from types import SimpleNamespace

import pytest
import torch

from dan_fast.training.metrics import Scalars, accuracy, pseudo_label_accuracy, pseudo_label_purity

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


def test_accuracy_is_the_share_of_right_classes():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 0.0]])
    assert float(accuracy(logits, torch.tensor([0, 1, 1, 0]))) == 0.75
