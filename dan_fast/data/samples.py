"""What every reader of a dataset returns, samples and splits, and the description by which the dataset is found."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "query", "gallery", "test")


class Sample(NamedTuple):
    """One image of a person: its file, its person identity (-1 where unknown) and its camera."""

    path: Path
    pid: int
    camid: int


def real_paths(samples: Iterable[Sample]) -> Iterator[str]:
    """The real path of each image: the same by whatever dataset, path or link it was named."""
    real_folder = cache(os.path.realpath)
    for sample in samples:
        folder, name = os.path.split(sample.path)
        path = os.path.join(real_folder(folder), name)
        yield os.path.realpath(path) if os.path.islink(path) else path


class FixedSplit(NamedTuple):
    """One way to part a dataset: images to train on, to search for, and to search in."""

    train: tuple[Sample, ...]
    query: tuple[Sample, ...]
    gallery: tuple[Sample, ...]


@dataclass(frozen=True)
class FixedSplits:
    """The splits of a dataset, by which results of different papers can be compared.

    Attributes:
        name: of the list.
        digest: SHA-256 (hex) of the file that the list stands in.
        splits: ten; none where images are missing.
        missing: what the folder lacks of them, in words; "" where it has everything.
    """

    name: str
    digest: str
    splits: tuple[FixedSplit, ...]
    missing: str = ""

    @property
    def label(self) -> str:
        """Name and first eight characters of the hash, as they go with every result."""
        return f"{self.name} {self.digest[:8]}"


class Counts(NamedTuple):
    """Identities, cameras and images of a split as the literature gives them; None where it does not."""

    ids: int | None
    cameras: int | None
    images: int | None


def count_samples(samples: Sequence[Sample]) -> Counts:
    """Identities and cameras, those below 0, unknown ones, left out, and images.

    Example:
        >>> count_samples([Sample(Path("a.jpg"), 7, 1), Sample(Path("b.jpg"), -1, 2)])
        Counts(ids=1, cameras=2, images=2)
    """
    ids, cameras = ({each[place] for each in samples if each[place] >= 0} for place in (1, 2))
    return Counts(len(ids), len(cameras), len(samples))


@dataclass(frozen=True)
class ReIDDataset:
    """A person re-identification dataset; a split it does not have is an empty tuple.

    Attributes:
        name: what messages and tables call it.
        root: the folder its files lie in.
        train: training images; pid -1 marks an image without known identity, which can only be used as an unlabelled
            one.
        query: images to search for.
        gallery: images to search in; pid 0 marks distractors in the Market-1501 layout.
        test: images that the evaluation itself splits into query and gallery, by `splits` or at random.
        variant: which of a dataset's variants this is, in words that go with every result ("detected, new
            protocol"); "" where there is only one.
        splits: the fixed splits of `test` by which results are compared; None where there are none.
        single_shot: whether a query is searched for in one gallery image of each person only, drawn anew many times.
        identities: a name for the numbering of persons, where it is not that of all datasets of this root; in two
            datasets with the same numbering, the same pid is the same person.

    Raises:
        TypeError: a pid or camid that is not a whole number.
    """

    name: str
    root: Path
    train: tuple[Sample, ...] = ()
    query: tuple[Sample, ...] = ()
    gallery: tuple[Sample, ...] = ()
    test: tuple[Sample, ...] = ()
    variant: str = ""
    splits: FixedSplits | None = None
    single_shot: bool = False
    identities: str = ""

    def __post_init__(self) -> None:
        for split in SPLITS:
            for path, *numbers in getattr(self, split):
                for name, number in zip(("pid", "camid"), numbers, strict=True):
                    if not isinstance(number, Integral):
                        raise TypeError(f"The {name} of {path} is {number!r}: number persons and cameras from 0.")

    @property
    def title(self) -> str:
        """Name and variant, as they stand beside every figure."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    @property
    def contents(self) -> str:
        """What each split holds, in words.

        Example:
            >>> images = [Sample(Path(f"{number}.jpg"), number // 2, number % 2) for number in range(5)]
            >>> ReIDDataset("shop", Path("shop"), train=tuple(images[2:]), test=tuple(images)).contents
            'shop: train 3 images, 2 persons, 2 cameras; test 5 images, 3 persons, 2 cameras, 2 of pid 0 as distractors'
        """
        searched = any(sample.pid == 0 for sample in self.query)
        parts = []
        for split in SPLITS:
            samples = getattr(self, split)
            counts = count_samples(samples)
            units = (("image", counts.images), ("person", counts.ids), ("camera", counts.cameras))
            words = ", ".join(f"{number:,} {unit}{'s' * (number != 1)}" for unit, number in units)
            distractors = sum(sample.pid == 0 for sample in samples) if split in ("gallery", "test") else 0
            if distractors and not searched and self.splits is None:
                words += f", {distractors:,} of pid 0 as distractors"
            parts += [f"{split} {words}"] if samples else []
        return f"{self.title}: {'; '.join(parts) or 'no images'}"


def without_variant(title: str) -> str:
    """The name in a `ReIDDataset.title`.

    Example:
        >>> without_variant("CUHK03 (detected, new protocol)"), without_variant("data (1)/market")
        ('CUHK03', 'data (1)/market')
    """
    return re.sub(r" \([^/]*\)$", "", title)


@dataclass(frozen=True)
class KnownDataset:
    """A dataset of the literature: how it is found and read, and what it should hold.

    Attributes:
        name: the word that selects it, such as "market1501".
        title: what the literature calls it.
        find: from a folder that is the dataset's own, contains it or lies one level inside it to the dataset's own
            folder; None for any other.
        read: (folder, name, variant) to the dataset; `folder` is what `find` gave, `variant` one of `variants`.
        counts: for each variant the counts of each split; a variant that it lacks is not checked, a split that a
            variant lacks is to be empty.
        source: the paper or page that the counts are from.
        origin: where the dataset can be requested, in words; "" where it is no longer distributed.
        note: a warning that is printed wherever the dataset is listed; "" for none.
        variants: the variants that a folder holds; ("",) where there is only one.
        extract: writes the images of an archive in a folder as files beside it and gives what was written; None where
            the dataset is distributed as image files.
    """

    name: str
    title: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, str, str], ReIDDataset]
    counts: Mapping[str, Mapping[str, Counts]]
    source: str
    origin: str
    note: str = ""
    variants: Callable[[Path], tuple[str, ...]] = lambda folder: ("",)
    extract: Callable[[Path], list[Path]] | None = None
