"""The train images of all source datasets merged into one labelled and one unlabelled set (Sec. III-D)."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.data.images.packed import Packed
from dan_fast.data.overlap import image_keys, numbering_of
from dan_fast.data.samples import ReIDDataset, Sample, real_paths

_Identity = tuple[str, int]  # (numbering, pid)


class TrainingSet:
    """The train splits of the labelled datasets with labels 0..c-1, and those of the unlabelled datasets.

    An identity is a pair (numbering, pid), by `overlap.numbering_of`: pids of different datasets never mix unless the
    datasets share a numbering, and gaps between pids do no harm. The position of an image in `unlabeled_samples` is its
    sample id, the one the memory stores. The true identities of unlabelled images only serve for measuring and enter no
    loss.

    Args:
        labeled: datasets whose train images of known identity train the classifier.
        unlabeled: datasets whose train images are used without their identity; none for training without
            them.
        unlabeled_share: share p in [0, 1] of the unlabelled images to keep (Fig. 7), chosen by `seed`; a
            smaller share of the same seed is part of a larger one.
        seed: seed of that choice.

    Attributes:
        labeled_samples: tuple of `Sample`.
        labels: (n_labeled,) int64, the class of each labelled sample.
        num_classes: number c of classes.
        unlabeled_samples: tuple of `Sample`.
        true_labels: (n_unlabeled,) int64, the class where the identity is one of the labelled ones, else -1.
        true_ids: (n_unlabeled,) int64, a number 0.. for each identity among the unlabelled images, -1 if
            unknown.
        persons: numbering of a dataset -> ascending int64 pids of its persons, labelled or not, in these images.
        images: (n,) int64, `overlap.image_keys` of these images, ascending.
        roots: the real paths of the datasets that these images come from.
        fingerprint: SHA-256 (hex) of dataset names, relative paths, labels and roles. Sample ids and labels
            mean the same in two sets of equal fingerprint, wherever the folders lie.

    Raises:
        DanFastError: no labelled image, fewer than two identities, a dataset without a train image for its role,
            an image given twice in one role, a share outside [0, 1].

    Example:
        >>> from pathlib import Path
        >>> root = Path("market")
        >>> people = tuple(Sample(root / f"{i}.jpg", pid, 1) for i, pid in enumerate((7, 3, 3)))
        >>> source = TrainingSet([ReIDDataset("market", root, train=people)])
        >>> source.labels.tolist(), source.num_classes, source.unlabeled_samples
        ([1, 0, 0], 2, ())
    """

    def __init__(
        self,
        labeled: Sequence[ReIDDataset],
        unlabeled: Sequence[ReIDDataset] = (),
        unlabeled_share: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0.0 <= unlabeled_share <= 1.0:
            raise DanFastError(f"The share of unlabelled images is {unlabeled_share}; choose it between 0 and 1.")
        known = [image for image in _train_images(labeled, "labelled") if image.sample.pid >= 0]
        without = [dataset for dataset in labeled if not any(sample.pid >= 0 for sample in dataset.train)]
        if without or not known:
            raise DanFastError(
                f"There is no train image of known identity in {_names(without)}; "
                "give a labelled dataset with a train split."
            )
        classes = _number_identities(known)
        if len(classes) < 2:
            raise DanFastError(f"All train images of {_names(labeled)} show one identity; give those of two or more.")
        self.labeled_samples = tuple(image.sample for image in known)
        self.labels = _numbers(known, classes)
        self.num_classes = len(classes)

        kept = _share(_train_images(unlabeled, "unlabelled"), unlabeled_share, seed)
        without = [dataset for dataset in unlabeled if not dataset.train]
        if without and unlabeled_share > 0:
            raise DanFastError(
                f"There is no train image in the unlabelled {_names(without)}; give another dataset, "
                "or none to train without unlabelled images."
            )
        people = _number_identities([image for image in kept if image.sample.pid >= 0])
        self.unlabeled_samples = tuple(image.sample for image in kept)
        self.true_labels = _numbers(kept, classes)
        self.true_ids = _numbers(kept, people)
        self.persons = _persons([*known, *kept])
        self.images = torch.tensor([*image_keys(image.sample for image in (*known, *kept))]).unique()
        trained_on = (*labeled, *(unlabeled if kept else ()))
        self.roots = tuple(dict.fromkeys(os.path.realpath(dataset.root) for dataset in trained_on))
        self.fingerprint = _fingerprint(known, self.labels, kept)

    @cached_property
    def paths(self) -> tuple[Packed[Path], Packed[Path]]:
        """Those of `labeled_samples` and of `unlabeled_samples`, as workers read them."""
        return (
            Packed(sample.path for sample in self.labeled_samples),
            Packed(sample.path for sample in self.unlabeled_samples),
        )


class _TrainImage(NamedTuple):
    sample: Sample
    identity: _Identity
    address: str  # the dataset's name and the path within it: what stays when the folders move


def _names(datasets: Sequence[ReIDDataset]) -> str:
    return ", ".join(f"{dataset.name} ({dataset.root})" for dataset in datasets) or "an empty list of datasets"


def _train_images(datasets: Sequence[ReIDDataset], role: str) -> list[_TrainImage]:
    images = []
    seen: set[str] = set()
    for dataset in datasets:
        numbering, own = numbering_of(dataset), dict[str, Path]()
        for sample, path in zip(dataset.train, real_paths(dataset.train), strict=True):
            relative = os.path.relpath(sample.path, dataset.root)
            if path in own:
                raise DanFastError(f"{own[path]} and {sample.path} of {dataset.name} are one file; remove one of them.")
            if path in seen:
                raise DanFastError(f"{sample.path} of {dataset.name} is {role} twice; name each dataset once.")
            own[path] = sample.path
            # Without the folders by which a set of the same name is told apart: they depend on what is tested on.
            address = f"{dataset.name.rpartition('/')[2]}\0{relative.replace(os.sep, '/')}"
            images.append(_TrainImage(sample, (numbering, sample.pid), address))
        seen.update(own)
    return images


def _number_identities(images: Sequence[_TrainImage]) -> dict[_Identity, int]:
    """Numbers by order of the datasets, then by pid: independent of the order of the files."""
    numberings = list(dict.fromkeys(image.identity[0] for image in images))
    ordered = sorted({image.identity for image in images}, key=lambda each: (numberings.index(each[0]), each[1]))
    return {identity: number for number, identity in enumerate(ordered)}


def _numbers(images: Sequence[_TrainImage], numbering: dict[_Identity, int]) -> Tensor:
    return torch.tensor([numbering.get(image.identity, -1) for image in images], dtype=torch.int64)


def _persons(images: Sequence[_TrainImage]) -> dict[str, Tensor]:
    pids: dict[str, list[int]] = {}
    for numbering, pid in sorted({image.identity for image in images if image.sample.pid >= 0}):
        pids.setdefault(numbering, []).append(pid)
    return {numbering: torch.tensor(ascending, dtype=torch.int64) for numbering, ascending in pids.items()}


def _share(images: list[_TrainImage], share: float, seed: int) -> list[_TrainImage]:
    count = max(round(share * len(images)), 1 if share > 0 else 0)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return [images[index] for index in sorted(order[:count].tolist())]


def _fingerprint(labeled: Sequence[_TrainImage], labels: Tensor, unlabeled: Sequence[_TrainImage]) -> str:
    digest = hashlib.sha256()
    of_labeled = (f"labeled\0{image.address}\0{label}\n" for image, label in zip(labeled, labels.tolist(), strict=True))
    for line in chain(of_labeled, (f"unlabeled\0{image.address}\n" for image in unlabeled)):
        # The bytes of file names that are no UTF-8 as they are.
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()
