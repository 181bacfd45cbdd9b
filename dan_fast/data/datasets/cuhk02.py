"""CUHK02: five pairs of cameras, P1 to P5, of two images a person and camera.

The pattern of a reader, see "Add a dataset" in CONTRIBUTING.md.
"""

import re
from pathlib import Path

from dan_fast.data.datasets.file_names import named_images
from dan_fast.data.datasets.finding import locate
from dan_fast.data.samples import Counts, KnownDataset, ReIDDataset, Sample

_PAIRS = (1, 2, 3, 4, 5)
_TEST_PAIR = 5
# Every pair numbers its people anew, from 1 to at most 971.
_PIDS_OF_A_PAIR = 1000
_NAME = re.compile(r"(\d{1,3})_")


def _holds(folder: Path) -> bool:
    return any((folder / f"P{pair}" / "cam1").is_dir() for pair in _PAIRS)


def _find(folder: Path) -> Path | None:
    parts = tuple(f"P{pair}" for pair in _PAIRS)
    return locate(folder, _holds, ("Dataset", "cuhk02", "cuhk02/Dataset"), parts)


def read_cuhk02(folder: Path, name: str, variant: str = "") -> ReIDDataset:
    """Reads CUHK02: P1 to P4 are the training split, in P5 camera 1 is searched for in camera 2.

    Cameras are numbered 1 to 10 over the pairs; person 7 of P3 gets the pid 3007.

    Raises:
        DanFastError: an image whose name does not begin with its person's number.
    """
    splits: dict[str, list[Sample]] = {"train": [], "query": [], "gallery": []}
    for pair in _PAIRS:
        for side in (1, 2):
            split = ("query", "gallery")[side - 1] if pair == _TEST_PAIR else "train"
            for path, match in named_images(folder / f"P{pair}" / f"cam{side}", _NAME, "001_1.png: person, image"):
                splits[split].append(Sample(path, _PIDS_OF_A_PAIR * pair + int(match[1]), 2 * (pair - 1) + side))
    return ReIDDataset(name, folder, **{split: tuple(samples) for split, samples in splits.items()})


CUHK02 = KnownDataset(
    name="cuhk02",
    title="CUHK02",
    find=_find,
    read=read_cuhk02,
    # 971, 306, 107, 193 and 239 people of four images each.
    counts={"": {"train": Counts(1577, 8, 6308), "query": Counts(239, 1, 478), "gallery": Counts(239, 1, 478)}},
    source="Li and Wang, CVPR 2013",
    origin="the CUHK person re-identification page of Xiaogang Wang, on request",
)
