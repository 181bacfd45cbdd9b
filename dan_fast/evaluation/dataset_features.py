"""Features of a dataset's evaluation images, and how they are parted into query and gallery."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.float32 import float32_rounding
from dan_fast.data.samples import FixedSplits, ReIDDataset, Sample
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.evaluation.features import Features, extract_features
from dan_fast.evaluation.scorable import require_evaluation_images


class DatasetFeatures(NamedTuple):
    """Features of a dataset's evaluation images: a fixed query and gallery, or images yet to be split.

    Where the images were divided over ranks, each rank holds the features of all queries, and only its own of the
    gallery and of the images to be split.

    Attributes:
        name: the dataset's name.
        query, gallery: of the fixed split, None where there is none.
        test: of the images to be split, each embedded once for all splits; None where there are none.
        variant: of the dataset, in words.
        splits: how `test` is split; None for random splits.
        single_shot: whether one image of each person is drawn from the gallery, many times.
        precision, rounding: in which the features were made, as `Evaluation` has them; "" where that is not known.
        fingerprint: of the images, as `Evaluation` has it; "" where that is not known.
    """

    name: str
    query: Features | None
    gallery: Features | None
    test: Features | None
    variant: str = ""
    splits: FixedSplits | None = None
    single_shot: bool = False
    precision: str = ""
    rounding: str = ""
    fingerprint: str = ""

    @property
    def skipped(self) -> tuple[str, ...]:
        """The files that could not be decoded, each once."""
        parts = (part for part in (self.query, self.gallery, self.test) if part is not None)
        return tuple(dict.fromkeys(str(path) for part in parts for path in part.skipped))

    def split(
        self, seed: int = 0, repeat: int = 0, process_group: ProcessGroup | None = None
    ) -> tuple[Features, Features]:
        """Query and gallery: the fixed ones, or those of the given repeat of the fixed or random splits.

        Images that could not be decoded are in neither; only random splits depend on `seed`. With `process_group`, over
        which the images are divided, features are exchanged: every rank gets all queries and as many gallery images, in
        the order of the gallery, as the others.
        """
        if self.test is None:
            return self.query, self.gallery
        if self.splits is not None:
            chosen = self.splits.splits[repeat]
            query, gallery = self._places(chosen.query), self._places(chosen.gallery)
        else:
            query, gallery = random_split(self.test.pids, self.test.camids, seed, repeat)
        return self.test.select(query, process_group), self.test.select(gallery, process_group, divided=True)

    def _places(self, samples: tuple[Sample, ...]) -> Tensor:
        place = {path: index for index, path in enumerate(self.test.paths)}
        known = {*place, *self.test.skipped}
        missing = [each.path for each in samples if each.path not in known]
        if missing:
            raise DanFastError(
                f"The features of {self.name} lack {len(missing)} images that its fixed splits name, {missing[0]} the "
                "first: embed all of them."
            )
        return torch.tensor([place[each.path] for each in samples if each.path in place], dtype=torch.int64)


def random_split(pids: Tensor, camids: Tensor, seed: int = 0, repeat: int = 0) -> tuple[Tensor, Tensor]:
    """Draw one image of each identity in each camera as a query; the rest is the gallery.

    An identity that would have all of its images drawn keeps one of them, drawn at random, in the gallery.
    With one image in each of two cameras, as in VIPeR, one is thus searched for and the other is to be found.
    Identity 0 is that of distractors, and none below it is known: they are in the gallery, all of them.

    Args:
        pids: (n,) int64 identities.
        camids: (n,) int64 cameras.
        seed: seed of the whole series of splits.
        repeat: which split of the series.

    Returns:
        (query, gallery): ascending int64 indices, disjoint, together all of ``range(n)``.

    Example:
        >>> import torch
        >>> query, gallery = random_split(torch.tensor([1, 1, 1, 2]), torch.tensor([1, 1, 2, 1]))
        >>> len(query), len(gallery)
        (2, 2)
    """
    order = np.random.default_rng([seed, repeat]).permutation(len(pids))
    people, cameras = pids.numpy()[order], camids.numpy()[order]
    # `unique` gives the first place of each pair, and the places are in random order.
    _, drawn = np.unique(np.stack([people, cameras], axis=1), axis=0, return_index=True)
    _, first, group, images = np.unique(people, return_index=True, return_inverse=True, return_counts=True)
    queries = np.bincount(group[drawn], minlength=len(images))
    drawn = np.setdiff1d(drawn[people[drawn] > 0], first[queries == images])
    is_query = np.zeros(len(pids), dtype=bool)
    is_query[order[drawn]] = True
    return torch.from_numpy(np.flatnonzero(is_query)), torch.from_numpy(np.flatnonzero(~is_query))


def extract_dataset(
    embed: Callable[[Tensor], Tensor],
    dataset: ReIDDataset,
    image_size: tuple[int, int],
    *,
    device: str | torch.device = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> DatasetFeatures:
    """Embed every evaluation image of a dataset once.

    Args:
        embed, image_size, device, precision, process_group, options: as in :func:`extract_features`.
        dataset: with query and gallery images, or test images.

    Raises:
        DanFastError: the dataset has neither a query and a gallery nor a test split, or lacks images that its fixed
            splits name; and see :func:`extract_features`.
    """
    require_evaluation_images(dataset)
    given = {"image_size": image_size, "device": device, "precision": precision, "process_group": process_group}
    extract = partial(extract_features, embed, **given, **options)
    rounding = float32_rounding(torch.device(device)) if precision == "float32" else ""
    made = {"precision": precision, "rounding": rounding, "fingerprint": _fingerprint(dataset)}
    if dataset.query:
        query = extract(dataset.query)
        gallery = query if dataset.gallery == dataset.query else extract(dataset.gallery)
        if process_group is not None:
            every = torch.arange(len(query.paths))
            query = query.select(every, process_group)._replace(skipped=query.skipped)
        return DatasetFeatures(
            dataset.name, query, gallery, None, variant=dataset.variant, single_shot=dataset.single_shot, **made
        )
    return DatasetFeatures(dataset.name, None, None, extract(dataset.test), dataset.variant, dataset.splits, **made)


def _fingerprint(dataset: ReIDDataset) -> str:
    digest = hashlib.sha256()
    for split in ("query", "gallery", "test"):
        for path, pid, camid in getattr(dataset, split):
            name = os.path.relpath(path, dataset.root).replace(os.sep, "/")
            # The bytes of file names that are no UTF-8 as they are.
            digest.update(f"{split}\0{name}\0{pid}\0{camid}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
