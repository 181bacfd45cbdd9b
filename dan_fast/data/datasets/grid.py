"""QMUL underGround Re-IDentification (GRID): 250 pairs of images from 8 cameras, and 775 people without one.

The original file names distinguish six cameras, not the eight of the literature.
"""

import re
from itertools import count
from pathlib import Path

from dan_fast.data.datasets.file_names import are_named, by_key, named_images
from dan_fast.data.datasets.finding import locate
from dan_fast.data.datasets.fixed_splits import fixed_splits
from dan_fast.data.samples import Counts, KnownDataset, ReIDDataset, Sample

# 0017_4_25330_281_160_130_303.jpeg: person 17, camera 4, then frame and box; person 0 is a distractor.
_NAME = re.compile(r"(\d{4})_([1-8])_(\d+)_\d+_\d+_\d+_\d+\.")
_EXAMPLE = "0001_1_25004_107_32_106_221.jpeg"
_PARTS = ("probe", "gallery")
_ALL = "images"
_DISTRACTORS = 775


def read_grid(folder: Path, name: str, variant: str = "") -> ReIDDataset:
    """Reads the folder underground_reid; all images are test images, the distractors have pid 0.

    The archive has the folders `probe` and `gallery`. fast-reid has all in `images`; there the earlier frame of a pair
    is the probe.

    The ten splits are 125 of the 250 people for training and 125 for testing; a probe is searched for among the 125
    gallery images of the test people and the 775 distractors. The splits are those of this package: they have
    nothing to do with the ten partitions in the archive's features_and_partitions.mat, which need not be there.

    Raises:
        DanFastError: an image of another name, or two images of a person in one part.
    """
    if (folder / "probe").is_dir():
        found = [(part, *each) for part in _PARTS for each in named_images(folder / part, _NAME, _EXAMPLE)]
    else:
        found = _apart(folder / _ALL)
    distractor = count(1)
    images = by_key(
        (
            _key(part, int(match[1])) if int(match[1]) else _distractor(next(distractor)),
            Sample(path, int(match[1]), int(match[2])),
        )
        for part, path, match in found
    )
    splits = fixed_splits(
        "grid",
        images,
        lambda split: (
            [_key(part, pid) for pid in split["train"] for part in _PARTS],
            [_key("probe", pid) for pid in split["test"]],
            [_key("gallery", pid) for pid in split["test"]] + [_distractor(n + 1) for n in range(_DISTRACTORS)],
        ),
    )
    return ReIDDataset(name, folder, test=tuple(images.values()), variant=variant, splits=splits)


def _apart(folder: Path) -> list[tuple[str, Path, re.Match[str]]]:
    """All images of one folder with the part that each belongs to."""
    found = named_images(folder, _NAME, _EXAMPLE)
    first: dict[str, int] = {}
    for _, match in found:
        first[match[1]] = min(int(match[3]), first.get(match[1], int(match[3])))
    return [
        ("probe" if int(match[1]) and int(match[3]) == first[match[1]] else "gallery", path, match)
        for path, match in found
    ]


def _key(part: str, pid: int) -> str:
    return f"{part}/{pid:04}"


def _distractor(number: int) -> str:
    return f"distractor {number} of {_DISTRACTORS}"


def _find(folder: Path) -> Path | None:
    def holds(place: Path) -> bool:
        return all(are_named(place / part, _NAME) for part in _PARTS) or are_named(place / _ALL, _NAME)

    return locate(folder, holds, ("underground_reid", "grid/underground_reid", "grid"), (*_PARTS, _ALL))


GRID = KnownDataset(
    name="grid",
    title="GRID",
    find=_find,
    read=read_grid,
    # Cameras are not checked: the literature has 8, the original file names 6.
    counts={"": {"test": Counts(251, None, 1275)}},
    source="Loy, Xiang and Gong, CVPR 2009 (250 pairs, and 775 distractors that count as one identity)",
    origin="the page of Chen Change Loy, QMUL underGround Re-IDentification",
)
