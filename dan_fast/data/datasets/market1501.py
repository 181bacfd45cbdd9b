"""Market-1501, and its folder layout, which many other sets are distributed in too."""

import logging
import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dan_fast.core.errors import DanFastError
from dan_fast.data.datasets.finding import image_files, locate
from dan_fast.data.samples import Counts, KnownDataset, ReIDDataset, Sample

PARTS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
# 0001_c1s1_000151_01.jpg: person 1, camera 1; other sets with this layout differ after the camera.
_NAME = re.compile(r"(-?\d+)_c(\d+)")
_OWN_NAME = re.compile(r"-?\d+_c\d+s\d+_")
_TITLE = re.compile(r"(?<![a-z])market", re.IGNORECASE)
# Of images that cameras and the web have and that are not read.
_UNREAD_SUFFIXES = {".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl"}
# Market-1501's boxes that were drawn by hand, which stand beside its parts and are no part.
_BESIDE = ("gt_bbox", "gt_query")
_LOG = logging.getLogger(__name__)


def is_market1501(folder: Path) -> bool:
    """Whether the folder holds at least one of bounding_box_train, bounding_box_test and query."""
    return any((folder / part).is_dir() for part in PARTS.values())


def is_named_market1501(folder: Path) -> bool:
    """The same, but a folder that is called "query" alone does not count if none of its images is named like one."""
    return is_market1501(folder) and (
        any((folder / PARTS[split]).is_dir() for split in ("train", "gallery")) or layout_with(folder, _NAME)
    )


def read_market1501(folder: Path, name: str, variant: str = "") -> ReIDDataset:
    """Reads a Market-1501 folder; absent parts are empty.

    Images of pid -1, bad detections, are left out of query and gallery; those to train on can serve as unlabelled ones.
    A warning is logged of files that look like more images of a part: in folders below it, or of another type, or where
    a part is absent in folders of other names.

    Raises:
        DanFastError: an image whose name does not begin with identity and camera, whole numbers below 2^63.
    """
    splits = {split: _read_part(folder / part) for split, part in PARTS.items()}
    _tell_of_other_folders(folder, {sample.path.name for part in splits.values() for sample in part})
    return ReIDDataset(name, folder, **splits, variant=variant)


def layout_with(folder: Path, name: re.Pattern[str]) -> bool:
    """Whether the folder has the layout and contains an image whose name matches `name`."""
    parts = (folder / part for part in PARTS.values() if (folder / part).is_dir())
    return any(name.match(path.name) for part in parts for path in part.iterdir())


def _find(folder: Path) -> Path | None:
    names = ("Market-1501-v15.09.15", "market1501", "Market-1501", "market1501/Market-1501-v15.09.15")
    return locate(folder, _is_its_own, names, tuple(PARTS.values()))


def _is_its_own(folder: Path) -> bool:
    """Whether it is called Market or has a part as large as published; people name their own images like its, too."""
    if not layout_with(folder, _OWN_NAME):
        return False
    published = MARKET1501.counts[""]
    return bool(_TITLE.search(folder.absolute().name)) or any(
        len(image_files(folder / PARTS[split])) == published[split].images for split in ("train", "query")
    )


def _read_part(folder: Path) -> tuple[Sample, ...]:
    samples, files = [], image_files(folder)
    for path in files:
        match = _NAME.match(path.name)
        # What a table of int64 holds.
        if match is None or max(map(int, match.groups())) >= 2**63:
            raise DanFastError(
                f"{path} is not named like a Market-1501 image (0001_c1s1_000151_01.jpg: person, camera); "
                "rename it, or describe the images in a manifest.csv with the columns path,pid,camid,split."
            )
        if int(match[1]) >= 0 or path.parent.name == PARTS["train"]:
            samples.append(Sample(path, int(match[1]), int(match[2])))
    _tell_of_others(folder, {path.name for path in files})
    return tuple(samples)


def _tell_of_others(part: Path, read: Collection[str]) -> None:
    """Warn of what looks like further images of a part: of a type that is not read, or in folders below it."""
    if not part.is_dir():
        return
    kinds, below = set(), 0
    for entry in os.scandir(part):
        if entry.is_dir():
            below += _others_in(Path(entry), read)
        elif _NAME.match(entry.name):
            kinds.add(Path(entry.name).suffix.lower())
    if below:
        _LOG.warning("Images in folders below %s are NOT READ (%d): move them up, or write a manifest.", part, below)
    if unread := sorted(kinds & _UNREAD_SUFFIXES):
        _LOG.warning("Images of type %s in %s are NOT READ: convert them to JPEG or PNG.", ", ".join(unread), part)


def _tell_of_other_folders(folder: Path, read: Collection[str]) -> None:
    """Warn of what may be an absent part by another name, such as "gallery"."""
    absent = [part for part in PARTS.values() if not (folder / part).is_dir()]
    places = sorted(folder.iterdir()) if absent else ()
    others = [each.name for each in places if each.name not in (*PARTS.values(), *_BESIDE) and _others_in(each, read)]
    if others:
        _LOG.warning(
            "%s has no %s, and the images in its %s are NOT READ: rename the folders, or write a manifest.",
            folder, " and no ".join(absent), " and ".join(others),
        )  # fmt: skip


def _others_in(folder: Path, read: Collection[str]) -> int:
    """How many images of a folder are named like those that were read, but not the same: masks have the same names."""
    with suppress(OSError):  # one that may not be read
        return sum(path.name not in read and _NAME.match(path.name) is not None for path in image_files(folder))
    return 0


MARKET1501 = KnownDataset(
    name="market1501",
    title="Market-1501",
    find=_find,
    read=read_market1501,
    # Without the junk of pid -1; the distractors of pid 0 count as one identity.
    counts={"": {"train": Counts(751, 6, 12936), "query": Counts(750, 6, 3368), "gallery": Counts(751, 6, 15913)}},
    source="Zheng et al., ICCV 2015",
    origin="the project page of Liang Zheng, Market-1501",
)
