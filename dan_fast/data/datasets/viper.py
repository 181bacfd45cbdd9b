"""VIPeR: 632 people, one image of each in each of two cameras."""

import re
from pathlib import Path

from dan_fast.data.datasets.file_names import are_named, by_key, named_images
from dan_fast.data.datasets.finding import locate
from dan_fast.data.datasets.fixed_splits import fixed_splits
from dan_fast.data.samples import Counts, FixedSplits, KnownDataset, ReIDDataset, Sample

# 000_45.bmp: person 0, seen at an angle of 45 degrees.
_NAME = re.compile(r"(\d{3})_\d+\.")
_PEOPLE = 632
_CAMERAS = {"cam_a": 1, "cam_b": 2}


def read_viper(folder: Path, name: str, variant: str = "") -> ReIDDataset:
    """Reads `cam_a` (camera 1) and `cam_b` (camera 2) of a folder; all images are test images.

    The pid is the number in the file name and one more, as 0 would mean a distractor. The ten splits are 316 people
    for training and 316 for testing; the list counts the people from 0 in ascending order of the numbers in the file
    names, which have gaps. The image of camera a is searched for among those of camera b. Some papers average this
    and the opposite direction, which is another figure.

    Raises:
        DanFastError: an image of another name, or two images of a person in one camera.
    """
    images = {
        camera: by_key(
            (match[1], Sample(path, int(match[1]) + 1, number))
            for path, match in named_images(folder / camera, _NAME, "000_45.bmp")
        )
        for camera, number in _CAMERAS.items()
    }
    test = tuple(sample for each in images.values() for sample in each.values())
    return ReIDDataset(name, folder, test=test, variant=variant, splits=_splits(images))


def _splits(images: dict[str, dict[str, Sample]]) -> FixedSplits:
    people = sorted(images["cam_a"].keys() & images["cam_b"].keys(), key=int)
    samples = {
        f"{camera} of person {place}": images[camera][person]
        for place, person in enumerate(people)
        for camera in _CAMERAS
    }
    found = fixed_splits(
        "viper",
        samples,
        lambda split: (
            [f"{camera} of person {place}" for place in split["train"] for camera in _CAMERAS],
            [f"cam_a of person {place}" for place in split["test"]],
            [f"cam_b of person {place}" for place in split["test"]],
        ),
    )
    if len(people) == _PEOPLE:
        return found
    # The list counts people: with one too few or too many it would mean others.
    return FixedSplits(found.name, found.digest, (), f"there are {len(people)} people in both cameras, not {_PEOPLE}")


def _find(folder: Path) -> Path | None:
    def holds(place: Path) -> bool:
        return all(are_named(place / camera, _NAME) for camera in _CAMERAS)

    return locate(folder, holds, ("VIPeR", "viper/VIPeR", "VIPeR.v1.0", "viper/VIPeR.v1.0"), tuple(_CAMERAS))


VIPER = KnownDataset(
    name="viper",
    title="VIPeR",
    find=_find,
    read=read_viper,
    counts={"": {"test": Counts(_PEOPLE, 2, 1264)}},
    source="Gray, Brennan and Tao, PETS 2007",
    origin="the vision group of the University of California, Santa Cruz, VIPeR",
)
