"""The datasets of the literature that are recognised: their variants, their counts, and where they lie."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dan_fast.core.errors import DanFastError
from dan_fast.data.datasets.cuhk02 import CUHK02
from dan_fast.data.datasets.cuhk03 import CUHK03
from dan_fast.data.datasets.cuhk_sysu import CUHK_SYSU
from dan_fast.data.datasets.dukemtmc import DUKEMTMC
from dan_fast.data.datasets.grid import GRID
from dan_fast.data.datasets.ilids import ILIDS
from dan_fast.data.datasets.market1501 import MARKET1501
from dan_fast.data.datasets.msmt17 import MSMT17
from dan_fast.data.datasets.prid import PRID
from dan_fast.data.datasets.viper import VIPER
from dan_fast.data.samples import SPLITS, Counts, KnownDataset, ReIDDataset, count_samples

# In the order of the paper's Table III; those that it does not have come after them.
KNOWN: Mapping[str, KnownDataset] = {
    known.name: known for known in (CUHK02, CUHK03, CUHK_SYSU, MARKET1501, DUKEMTMC, VIPER, PRID, GRID, ILIDS, MSMT17)
}

_LOG = logging.getLogger(__name__)
_NOUNS = {"ids": "identities", "cameras": "cameras", "images": "images"}
_WORD = re.compile(r"\w+")
_SPLIT_NUMBER = re.compile(r", split \d+$")


@dataclass(frozen=True)
class FoundDataset:
    """One variant of a known dataset at a place.

    Attributes:
        known: which dataset.
        path: the folder of its images.
        variant: which of its variants, "" where there is only one.
        counts: what each split that is not empty holds.
        differences: sentences on what differs from the literature.
        error: why it cannot be read; "" where it can.
    """

    known: KnownDataset
    path: Path
    variant: str
    counts: Mapping[str, Counts]
    differences: tuple[str, ...] = ()
    error: str = ""


def choose_variant(known: KnownDataset, folder: Path, wanted: str | None = None) -> str:
    """The variant that `wanted` selects; without it the only one there is.

    `wanted` may leave out words that are not needed to distinguish the variants: "new, labeled" is CUHK03's
    "labeled, new protocol".

    Raises:
        DanFastError: several variants and no choice, or a choice that selects none or several; the choices are named.
    """
    variants = known.variants(folder)
    if not variants:
        # The reader raises the error that names what is missing.
        known.read(folder, known.title, "")
    words = set(_WORD.findall((wanted or "").lower()))
    fitting = [variant for variant in variants if words <= set(_WORD.findall(variant.lower()))]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        choices = f"choose {_listed(variants)}" if variants != ("",) else "it has only one, so name none"
        raise DanFastError(f"{known.title} at {folder} has no variant {wanted!r}; {choices}.")
    asked = f"several variants that {wanted!r} fits" if words else "several variants, and their figures differ"
    raise DanFastError(
        f"{known.title} at {folder} has {asked}; choose {_listed(fitting)}, as in '{folder}@{fitting[0]}'."
    )


def _listed(variants: Sequence[str]) -> str:
    """The variants as a list for a sentence, all splits of a protocol as one."""
    alike: dict[str, list[str]] = {}
    for variant in variants:
        alike.setdefault(_SPLIT_NUMBER.sub("", variant), []).append(variant)
    names = [
        found[0] if len(found) == 1 else f"{found[0]} to {found[-1].rsplit(' ', 1)[-1]}" for found in alike.values()
    ]
    return " or ".join(repr(name) for name in names)


def counts_of(dataset: ReIDDataset) -> dict[str, Counts]:
    """What each split that is not empty holds."""
    return {split: count_samples(getattr(dataset, split)) for split in SPLITS if getattr(dataset, split)}


def check_counts(dataset: ReIDDataset, known: KnownDataset) -> list[str]:
    """Sentences on the differences from the literature: counts of each split, images that fixed splits lack."""
    expected = known.counts.get(dataset.variant, {})
    sentences = []
    for split in SPLITS if expected else ():
        found = count_samples(getattr(dataset, split))
        given = expected.get(split, Counts(0, 0, 0))
        wrong = [
            f"{number} instead of {right} {_NOUNS[unit]}"
            for unit, number, right in zip(Counts._fields, found, given, strict=True)
            if right is not None and number != right
        ]
        if wrong:
            sentences.append(f"The {split} split of {dataset.title} differs from {known.source}: {', '.join(wrong)}.")
    if dataset.splits is not None and dataset.splits.missing:
        sentences.append(f"{dataset.title} cannot be scored on its fixed splits: {dataset.splits.missing}.")
    return sentences


def find_datasets(root: Path) -> list[FoundDataset]:
    """Every variant of every known dataset at `root`, in its folders, and in their folders.

    Of the 20 splits of CUHK03's classic protocol the first stands for all. A dataset that cannot be read is
    listed with the reason; nothing is changed or downloaded.

    Raises:
        DanFastError: there is no such folder, or it cannot be read; a folder in it that cannot is passed over with a
            warning.
    """
    try:
        if not root.is_dir():
            raise DanFastError(f"There is no folder {root}; check the path for a typing mistake.")
        return _find(root)
    except OSError as error:
        raise DanFastError(f"{error.filename} cannot be read ({error.strerror}); check permissions.") from error


def _find(root: Path) -> list[FoundDataset]:
    found: list[FoundDataset] = []
    own: dict[str, list[Path]] = {name: [] for name in KNOWN}
    pending = [(root, 2)]
    while pending:
        folder, depth = pending.pop(0)
        for known in KNOWN.values():
            place = known.find(folder)
            if place is not None and not any(place.resolve().is_relative_to(other) for other in own[known.name]):
                variants = [x for x in known.variants(place) if x.endswith("split 1") or not _SPLIT_NUMBER.search(x)]
                new = [_inspect(known, place, variant) for variant in variants or [""]]
                own[known.name] += [each.path.resolve() for each in new]
                found += new
        # Folders inside a dataset are its own parts, often with tens of thousands of files.
        if depth and not any(folder.resolve() in places for places in own.values()):
            pending += [(child, depth - 1) for child in sorted(folder.iterdir()) if child.is_dir() and _is_open(child)]
    return found


def _is_open(folder: Path) -> bool:
    """Whether it can be read; a disk has a folder, lost+found, that only the system may read."""
    if os.access(folder, os.R_OK | os.X_OK):
        return True
    _LOG.warning("%s cannot be read and is passed over.", folder)
    return False


def _inspect(known: KnownDataset, place: Path, variant: str) -> FoundDataset:
    try:
        dataset = known.read(place, known.title, variant)
    except (DanFastError, OSError) as error:
        return FoundDataset(known, place, variant, {}, error=str(error))
    return FoundDataset(known, dataset.root, variant, counts_of(dataset), tuple(check_counts(dataset, known)))
