"""The images that paths name: datasets with identities and cameras, and any other images without."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from glob import escape, glob, has_magic
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from dan_fast.core.errors import DanFastError
from dan_fast.core.home import expanded
from dan_fast.data.datasets.finding import images_below
from dan_fast.data.datasets.load import holds_dataset, load_dataset, told_apart
from dan_fast.data.samples import SPLITS, ReIDDataset, Sample

# What `dan-fast search` writes into its folder: the lists, and beside them a folder of the pictures of its page.
LISTS, PICTURES = "ranked.json", "search_images"
_LOG = logging.getLogger(__name__)


class Part(NamedTuple):
    """Images that the evaluation reads one after the other: its batches do not reach beyond them.

    Attributes:
        split: of the dataset that they are of; "" for other images.
        samples: the images, pid and camid -1 where they are unknown.
        dataset: that they are of, different ones by different titles; None for other images.
    """

    split: str
    samples: tuple[Sample, ...]
    dataset: ReIDDataset | None = None


def find_images(paths: Sequence[str]) -> list[Part]:
    """The images at paths, in the order of the paths.

    A path is a dataset, which is what `dan_fast.data.load_dataset` takes, including a manifest; each of its splits is a
    part of its own. Or it is a folder, a file, or a pattern of files such as "frames/**/*.jpg". In a folder all files
    named like images count, in the order of their names, including those in folders below but not hidden ones. Images
    of these three kinds that follow each other are one part. Links are followed, also to folders. The pictures of a
    page that `dan-fast search` wrote do not count as images of a folder or a pattern.

    Args:
        paths: as above.

    Raises:
        DanFastError: nothing at a path, a folder without images, or a dataset with mistakes in it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.jpg", "a.png", "notes.txt"):
        ...     (folder / name).touch()
        >>> [(part.split, [sample.path.name for sample in part.samples]) for part in find_images([str(folder)])]
        [('', ['a.png', 'b.jpg'])]
    """
    found = _by_title([part for path in paths for part in _parts_at(path)])
    parts: list[Part] = []
    for of_dataset, group in groupby(found, lambda part: part.dataset is not None):
        some = list(group)
        parts += some if of_dataset else [Part("", samples_of(some))]
    return parts


def _by_title(parts: Sequence[Part]) -> list[Part]:
    """The parts, of datasets whose titles tell them apart."""
    datasets = {id(part.dataset): part.dataset for part in parts if part.dataset is not None}
    named = dict(zip(datasets, told_apart(list(datasets.values())), strict=True))
    return [part._replace(dataset=named.get(id(part.dataset))) for part in parts]


def samples_of(parts: Iterable[Part]) -> tuple[Sample, ...]:
    """The images of all parts, in their order."""
    return tuple(sample for part in parts for sample in part.samples)


def _parts_at(text: str) -> Iterator[Part]:
    if not text:
        raise DanFastError("The path of images is empty, as by a variable of the shell that is not set: name it.")
    path = expanded(text)
    if path.is_dir() and not holds_dataset(path):
        yield _unknown(images_below(path, _is_of_a_page))
    elif path.is_file() and path.suffix.lower() != ".csv":
        yield _unknown([path])
    elif path.exists() or _names_a_variant(path):
        dataset = load_dataset(path)
        parts = [Part(split, getattr(dataset, split), dataset) for split in SPLITS if getattr(dataset, split)]
        _tell_what_lies_beside(path, dataset)
        if not parts:
            raise DanFastError(f"The dataset at {path} has no images; name another one.")
        yield from parts
    else:
        # A folder may have brackets in its name, which are a part of a pattern elsewhere.
        folder = next((each for each in path.parents if each.is_dir()), Path())
        pattern = os.path.join(escape(str(folder)), path.relative_to(folder))
        found = (Path(name) for name in sorted(glob(pattern, recursive=True)))
        files = _once([file for file in found if file.is_file() and not _is_of_a_page(file.parent)])
        if not files:
            raise DanFastError(
                f"There is nothing at {text}, and no file fits it as a pattern; check for a typing mistake."
            )
        yield _unknown(files)


def _once(files: Sequence[Path]) -> list[Path]:
    """Each file by one path, where links to folders give it several, as one to a folder above does without end.

    The path is the one that goes through no link, or else the first of the shortest.
    """
    by_place: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        by_place.setdefault((os.path.realpath(file.parent), file.name), []).append(file)
    return sorted(
        min(same, key=lambda file: (os.path.abspath(file.parent) != real, len(file.parts)))
        for (real, _), same in by_place.items()
    )


def _tell_what_lies_beside(path: Path, dataset: ReIDDataset) -> None:
    """Warn where a folder above a dataset holds other images too, which are not read."""
    root, above = dataset.root.absolute(), path.absolute()
    if root == above or not root.is_relative_to(above):
        return
    others = [file for file in images_below(path, _is_of_a_page) if not file.absolute().is_relative_to(root)]
    if others:
        _LOG.warning(
            "%s is read as %s, which lies at %s: %d other images below it, such as %s, are left out.",
            path, dataset.title, dataset.root, len(others), others[0],
        )  # fmt: skip


def _names_a_variant(path: Path) -> bool:
    """Whether it is PATH@VARIANT; a pattern may have an @ too."""
    stem, at, _ = path.name.rpartition("@")
    return bool(at) and (not has_magic(path.name) or (path.with_name(stem) if stem else path.parent).exists())


def _unknown(files: Sequence[Path]) -> Part:
    return Part("", tuple(Sample(file, -1, -1) for file in files))


def _is_of_a_page(folder: Path) -> bool:
    """Whether it holds the pictures of a search's page, which are parts of galleries and queries."""
    return folder.name == PICTURES and (folder.parent / LISTS).is_file()
