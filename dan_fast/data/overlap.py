"""Persons that are both trained on and tested on, identified by the dataset's root and their number."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set

from dan_fast.core.errors import DanFastError
from dan_fast.data.samples import ReIDDataset


def root_of(dataset: ReIDDataset) -> str:
    """The real path of a dataset's root: the same by whatever path it was named, and for all its variants."""
    return os.path.realpath(dataset.root)


def persons_tested(dataset: ReIDDataset) -> set[int]:
    """The pids that are searched for or can be found; distractors, pid 0 without a query, are left out."""
    searched = {sample.pid for sample in dataset.query if sample.pid >= 0}
    return searched | {sample.pid for sample in (*dataset.gallery, *dataset.test) if sample.pid > 0}


def persons_in_both(trained: Mapping[str, Set[int]], target: ReIDDataset) -> list[int]:
    """The persons of a target that were trained on, ascending.

    Args:
        trained: `root_of` a dataset -> pids of the persons trained on.
        target: the dataset tested on.
    """
    return sorted(trained.get(root_of(target), frozenset()) & persons_tested(target))


def require_disjoint_persons(
    trained_on: Iterable[ReIDDataset], targets: Iterable[ReIDDataset], who: str, remedy: str
) -> None:
    """Refuse to train on persons who are tested on.

    Args:
        trained_on: datasets whose train images are trained on, with labels or without.
        targets: datasets that are tested on.
        who: the subject of the error sentence, such as "This training".
        remedy: how the error sentence ends.

    Raises:
        DanFastError: names the first dataset and target with a person in common.
    """
    targets = list(targets)
    for dataset in trained_on:
        trained = {root_of(dataset): {sample.pid for sample in dataset.train if sample.pid >= 0}}
        for target in targets:
            both = persons_in_both(trained, target)
            if both:
                raise DanFastError(
                    f"{who} would train on people of its target {target.title}: {len(both)} of them, person {both[0]} "
                    f"the first, are among the train images of {dataset.title} ({dataset.root}); {remedy}."
                )
