"""The fused training set: labels, what is known about unlabelled images, the share, the fingerprint."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dan_fast.data import ReIDDataset, Sample, TrainingSet
from tests.support.refusals import refusal


def dataset(name: str, pids: Sequence[int], root: str | None = None, first: int = 0) -> ReIDDataset:
    folder = Path("sets", root or name)
    train = tuple(Sample(folder / f"{first + i}.jpg", pid, 1 + i % 2) for i, pid in enumerate(pids))
    return ReIDDataset(name, folder, train=train)


def test_labels_are_contiguous_over_all_labelled_datasets_in_spite_of_gaps() -> None:
    one, two = dataset("one", [900, 5, 5, 17]), dataset("two", [5, 3])
    source = TrainingSet([one, two])
    assert source.labels.tolist() == [2, 0, 0, 1, 4, 3]
    assert source.labels.dtype == torch.int64
    assert source.num_classes == 5
    assert source.labeled_samples == one.train + two.train
    assert source.unlabeled_samples == () and source.true_labels.shape == (0,)


def test_only_train_splits_are_used_and_unknown_identities_are_no_labelled_images() -> None:
    mixed = dataset("mixed", [4, -1, 8])
    mixed = replace(mixed, query=mixed.train[:1], gallery=mixed.train[2:])
    source = TrainingSet([mixed], [dataset("extra", [-1, 4])])
    assert [sample.pid for sample in source.labeled_samples] == [4, 8]
    assert source.labels.tolist() == [0, 1]
    assert len(source.unlabeled_samples) == 2


def test_truth_about_unlabelled_images_is_known_by_root_and_pid() -> None:
    labeled = [dataset("one", [40, 20]), dataset("two", [20, 30])]
    # The second list of images of two's folder: there 20 is two's person, not one's.
    unlabeled = [dataset("rest", [30, 20, -1, 77], root="two", first=2), dataset("else", [20, 20, 10])]
    source = TrainingSet(labeled, unlabeled)
    assert source.true_labels.tolist() == [3, 2, -1, -1, -1, -1, -1]
    assert source.true_ids.tolist() == [1, 0, -1, 2, 4, 4, 3]
    assert source.true_labels.dtype == source.true_ids.dtype == torch.int64
    assert source.unlabeled_samples == unlabeled[0].train + unlabeled[1].train


def test_share_is_seeded_nested_and_in_order() -> None:
    labeled, unlabeled = [dataset("one", [1, 2])], [dataset("many", [-1] * 40)]

    def kept(share: float, seed: int = 0) -> list[Sample]:
        return list(TrainingSet(labeled, unlabeled, unlabeled_share=share, seed=seed).unlabeled_samples)

    everything = list(unlabeled[0].train)
    assert kept(1.0) == everything and kept(0.0) == []
    half, quarter = kept(0.5), kept(0.25)
    assert len(half) == 20 and len(quarter) == 10 and set(quarter) < set(half)
    assert half == sorted(half, key=everything.index) and half != everything[:20]
    assert half == kept(0.5) != kept(0.5, seed=1)
    assert len(kept(0.001)) == 1 and len(kept(0.29)) == 12
    # For a share of none no unlabelled image is needed.
    assert TrainingSet(labeled, [dataset("none", [])], unlabeled_share=0.0).unlabeled_samples == ()


def test_fingerprint_follows_paths_labels_roles_and_share_but_not_the_place() -> None:
    one, two, extra = dataset("one", [1, 2]), dataset("two", [1, 2]), dataset("extra", [-1] * 4)
    base = TrainingSet([one, two], [extra]).fingerprint
    moved = dataset("one", [1, 2], root="elsewhere")
    assert len(base) == 64 and int(base, 16) >= 0
    assert TrainingSet([moved, two], [extra]).fingerprint == base
    # Gaps between pids change no label.
    assert TrainingSet([dataset("one", [1, 9]), two], [extra]).fingerprint == base
    # By what folder one is told apart from a target of its name depends on the targets.
    assert TrainingSet([replace(one, name="x/one"), two], [extra]).fingerprint == base
    others = [
        TrainingSet([two, one], [extra]),
        TrainingSet([one, two]),
        TrainingSet([one], [two, extra]),
        TrainingSet([dataset("one", [2, 1]), two], [extra]),
        TrainingSet([dataset("one", [1, 2], first=1), two], [extra]),
        TrainingSet([one, two], [dataset("extra", [-1])]),
        TrainingSet([one, two], [extra], unlabeled_share=0.5),
    ]
    prints = [other.fingerprint for other in others]
    assert base not in prints and len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "share", "expected"),
    [
        ([], [], 1.0, "no train image of known identity in an empty list"),
        ([dataset("one", [-1, -1])], [], 1.0, "no train image of known identity in one (sets/one)"),
        ([dataset("a", [1, 2]), dataset("one", [])], [], 1.0, "of known identity in one (sets/one); give"),
        ([dataset("one", [3, 3])], [], 1.0, "one (sets/one) show one identity"),
        ([dataset("one", [3, 4])], [dataset("none", [])], 0.5, "no train image in the unlabelled none"),
        ([dataset("one", [3, 4])], [dataset("x", [1]), dataset("none", [])], 0.5, "in the unlabelled none (sets/none)"),
        ([dataset("one", [3, 4])] * 2, [], 1.0, "0.jpg of one is labelled twice"),
        ([dataset("one", [3, 4])], [dataset("x", [1])] * 2, 1.0, "0.jpg of x is unlabelled twice"),
        ([dataset("one", [3, 4])], [dataset("x", [1])], 1.5, "1.5; choose it between 0 and 1"),
    ],
)
def test_mistakes(labeled: list[ReIDDataset], unlabeled: list[ReIDDataset], share: float, expected: str) -> None:
    assert expected in refusal(TrainingSet, labeled, unlabeled, share)


def test_a_file_name_may_have_bytes_that_are_no_utf_8() -> None:
    def of(name: bytes) -> str:
        odd = ReIDDataset("odd", Path("/odd"), train=(Sample(Path("/odd", os.fsdecode(name)), 1, 1),))
        return TrainingSet([dataset("a", [1, 2]), odd]).fingerprint

    assert of(b"caf\xe9.jpg") == of(b"caf\xe9.jpg") != of(b"caf\xe8.jpg")
