"""The folder layout of Market-1501, which many other sets are distributed in too."""

from __future__ import annotations

import re
from pathlib import Path

from dan_fast.data.samples import ReIDDataset, Sample
from dan_fast.errors import DanFastError

PARTS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
# 0001_c1s1_000151_01.jpg: person 1, camera 1; the sets that borrowed the layout differ after the camera.
_NAME = re.compile(r"(-?\d+)_c(\d+)")


def is_market1501(folder: Path) -> bool:
    """Whether the folder holds at least one of bounding_box_train, bounding_box_test and query."""
    return any((folder / part).is_dir() for part in PARTS.values())


def read_market1501(folder: Path, name: str) -> ReIDDataset:
    """Reads a Market-1501 folder; images of pid -1 (bad detections) are left out, absent parts are empty.

    Raises:
        DanFastError: an image whose name does not begin with identity and camera.
    """
    splits = {split: _read_part(folder / part) for split, part in PARTS.items()}
    return ReIDDataset(name, folder, **splits)


def _read_part(folder: Path) -> tuple[Sample, ...]:
    if not folder.is_dir():
        return ()
    samples = []
    # Sorted by name: the order of a directory listing differs between file systems.
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        match = _NAME.match(path.name)
        if match is None:
            raise DanFastError(
                f"{path} is not named like a Market-1501 image (0001_c1s1_000151_01.jpg: person, camera); "
                "rename it, or describe the images in a manifest.csv with the columns path,pid,camid,split."
            )
        if int(match[1]) >= 0:
            samples.append(Sample(path, int(match[1]), int(match[2])))
    return tuple(samples)
