"""QMUL i-LIDS (MCTS): 119 people, 476 images of an airport's arrival hall."""

import re
from pathlib import Path

from dan_fast.data.datasets.file_names import are_named, by_key, named_images
from dan_fast.data.datasets.finding import image_files, locate
from dan_fast.data.datasets.fixed_splits import fixed_splits
from dan_fast.data.samples import Counts, KnownDataset, ReIDDataset, Sample

# 0069002.jpg: person 69, image 2.
_NAME = re.compile(r"(0(?!000)[01]\d\d)(00[1-9])\.")


def read_ilids(folder: Path, name: str, variant: str = "") -> ReIDDataset:
    """Reads the folder Persons; all images are test images.

    The file names do not contain the camera. The number of an image among those of its person takes its place, so that
    any image of a person is a match of any other, as is usual. The ten splits are 59 people for training
    and 60 for testing, of each of whom the list names one image to search for and another one to find.

    Raises:
        DanFastError: an image of another name, or two files of one image.
    """
    images = by_key(
        (match[1] + match[2], Sample(path, int(match[1]), int(match[2])))
        for path, match in named_images(folder, _NAME, "0001001.jpg")
    )
    splits = fixed_splits(
        "ilids",
        images,
        lambda split: (
            [key for key, sample in images.items() if sample.pid in split["train"]],
            split["query"],
            split["gallery"],
        ),
    )
    return ReIDDataset(name, folder, test=tuple(images.values()), variant=variant, splits=splits)


def _find(folder: Path) -> Path | None:
    names = ("Persons", "i-LIDS_Pedestrian/Persons", "ilids/i-LIDS_Pedestrian/Persons", "QMUL-iLIDS/images", "images")
    return locate(folder, _holds, names)


def _holds(place: Path) -> bool:
    # The frames of a clip, numbered alike, are of one person if of any.
    named = map(_NAME.match, (path.name for path in image_files(place)))
    return are_named(place, _NAME) and len({match[1] for match in named if match}) > 1


ILIDS = KnownDataset(
    name="ilids",
    title="i-LIDS",
    find=_find,
    read=read_ilids,
    counts={"": {"test": Counts(119, None, 476)}},
    source="Zheng, Gong and Xiang, BMVC 2009",
    origin="Queen Mary University of London, i-LIDS pedestrian images",
    note="The set of 119 people of the protocols; Table III describes iLIDS-VID, a set of videos of 300 others.",
)
