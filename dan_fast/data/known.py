"""The datasets of the literature that are recognised, what they should hold, and which of them lie where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dan_fast.data import market1501
from dan_fast.data.samples import SPLITS, Counts, KnownDataset, ReIDDataset, Sample
from dan_fast.errors import DanFastError

__all__ = ["KNOWN", "Counts", "FoundDataset", "KnownDataset", "check_counts", "count_samples", "find_datasets"]

# In the order of the paper's Table III.
KNOWN: Mapping[str, KnownDataset] = {known.name: known for known in (market1501.MARKET1501,)}


@dataclass(frozen=True)
class FoundDataset:
    """One variant of a known dataset at a place.

    Attributes:
        known: which dataset.
        path: its own folder.
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


def count_samples(samples: Sequence[Sample]) -> Counts:
    """Identities (pid -1, unknown, is none), cameras and images.

    Example:
        >>> count_samples([Sample(Path("a.jpg"), 7, 1), Sample(Path("b.jpg"), -1, 2)])
        Counts(ids=1, cameras=2, images=2)
    """
    ids = {sample.pid for sample in samples if sample.pid >= 0}
    return Counts(len(ids), len({sample.camid for sample in samples}), len(samples))


def check_counts(dataset: ReIDDataset, known: KnownDataset) -> list[str]:
    """What differs from the counts that the literature gives, a sentence a split; nothing where all agree."""
    expected = known.counts.get(dataset.variant, {})
    what = f"{dataset.name} ({dataset.variant})" if dataset.variant else dataset.name
    sentences = []
    for split in SPLITS if expected else ():
        found = count_samples(getattr(dataset, split))
        given = expected.get(split, Counts(0, 0, 0))
        wrong = [
            f"{number} {unit} instead of {right}"
            for number, right, unit in zip(found, given, Counts._fields, strict=True)
            if right is not None and number != right
        ]
        if wrong:
            sentences.append(f"The {split} split of {what} has {', '.join(wrong)} ({known.source}).")
    return sentences


def find_datasets(root: Path) -> list[FoundDataset]:
    """Every variant of every known dataset at `root`, in one of its folders, or in one of theirs.

    A dataset that cannot be read is listed with the reason; nothing is changed or downloaded.
    """
    found = []
    seen: set[tuple[str, Path]] = set()
    for folder in _folders(root, depth=2):
        for known in KNOWN.values():
            place = known.find(folder)
            if place is not None and (known.name, place.resolve()) not in seen:
                seen.add((known.name, place.resolve()))
                found += [_inspect(known, place, variant) for variant in known.variants(place)]
    return found


def _folders(root: Path, depth: int) -> Iterator[Path]:
    yield root
    if depth:
        for child in sorted(root.iterdir()):
            if child.is_dir():
                yield from _folders(child, depth - 1)


def _inspect(known: KnownDataset, place: Path, variant: str) -> FoundDataset:
    try:
        dataset = known.read(place, known.title, variant)
    except DanFastError as error:
        return FoundDataset(known, place, variant, {}, error=str(error))
    counts = {split: count_samples(getattr(dataset, split)) for split in SPLITS if getattr(dataset, split)}
    return FoundDataset(known, place, variant, counts, tuple(check_counts(dataset, known)))
