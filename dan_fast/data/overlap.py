"""Persons that are both trained on and tested on: by numbering and number, or by an image's file."""

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from hashlib import blake2b
from itertools import combinations

from dan_fast.core.errors import DanFastError
from dan_fast.data.samples import ReIDDataset, Sample, real_paths


def numbering_of(dataset: ReIDDataset) -> str:
    """Within what a dataset's pids name persons: the numbering that it names, else the real path of its root.

    That path is the same by whatever path the dataset was named, and for all its variants.
    """
    return dataset.identities or os.path.realpath(dataset.root)


def image_keys(samples: Iterable[Sample]) -> Iterator[int]:
    """A number in the range of int64 for each image, by its real path; of two images it is the same by chance alone."""
    for path in real_paths(samples):
        yield int.from_bytes(blake2b(os.fsencode(path), digest_size=8).digest(), "big", signed=True)


def persons_tested(dataset: ReIDDataset) -> set[int]:
    """The pids that are searched for or can be found; distractors, pid 0 without a query, are left out."""
    searched = {sample.pid for sample in dataset.query if sample.pid >= 0}
    return searched | {sample.pid for sample in (*dataset.gallery, *dataset.test) if sample.pid > 0}


def persons_in_both(trained: Mapping[str, Set[int]], target: ReIDDataset, images: Set[int] = frozenset()) -> list[int]:
    """The persons of a target that were trained on, ascending.

    Args:
        trained: `numbering_of` a dataset -> pids of the persons trained on.
        target: the dataset tested on.
        images: `image_keys` of the images trained on, which may be named by another dataset, with other pids or none.
    """
    found, tested = set(trained.get(numbering_of(target), frozenset())), persons_tested(target)
    if images:
        samples = (*target.query, *target.gallery, *target.test)
        found |= {sample.pid for sample, key in zip(samples, image_keys(samples), strict=True) if key in images}
    return sorted(found & tested)


def taken_for_one(datasets: Iterable[ReIDDataset]) -> Iterator[str]:
    """A sentence for each two manifests of one folder with pids in common, which are taken for the same persons."""
    for one, other in combinations(datasets, 2):
        # Variants of one dataset have its name.
        if one.name == other.name or numbering_of(one) != numbering_of(other):
            continue
        pids = ({sample.pid for sample in each.train if sample.pid >= 0} for each in (one, other))
        if both := set.intersection(*pids):
            yield (
                f"{len(both)} persons, {min(both)} the first, are taken for the same ones in {one.name} and in "
                f"{other.name}, which lie in one folder: if each numbers persons of its own, give each a folder."
            )


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
        trained = {numbering_of(dataset): {sample.pid for sample in dataset.train}}
        images = set(image_keys(dataset.train)) if targets else frozenset()
        for target in targets:
            both = persons_in_both(trained, target, images)
            if both:
                raise DanFastError(
                    f"{who} would train on people of its target {target.title}: {len(both)} of them, person {both[0]} "
                    f"the first, are among the train images of {dataset.title} ({dataset.root}); {remedy}."
                )
