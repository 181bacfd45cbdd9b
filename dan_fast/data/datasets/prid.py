"""PRID 2011, single shot: 385 people in one camera, 749 in the other, 200 of them in both."""

import re
from pathlib import Path

from dan_fast.data.datasets.file_names import are_named, by_key, named_images
from dan_fast.data.datasets.finding import locate
from dan_fast.data.datasets.fixed_splits import fixed_splits
from dan_fast.data.samples import Counts, KnownDataset, ReIDDataset, Sample

_NAME = re.compile(r"person_(\d+)\.")
_CAMERAS = {"cam_a": 1, "cam_b": 2}
_IN_BOTH, _IN_B = 200, 749


def read_prid(folder: Path, name: str, variant: str = "") -> ReIDDataset:
    """Reads `cam_a` (camera 1) and `cam_b` (camera 2) of the folder single_shot; all images are test images.

    The people numbered up to 200 are the same in both cameras. From 201 on the same number means another person in
    each: that of camera b gets 1000 more as its pid. The ten splits are 100 people of the first 200 for training and
    100 for testing; an image of camera a is searched for among 649 of camera b, those of the test people and of the
    549 who appear there only.

    Raises:
        DanFastError: an image of another name, or two images of a person in one camera.
    """

    def sample(path: Path, number: int, camera: str) -> Sample:
        only_in_b = camera == "cam_b" and number > _IN_BOTH
        return Sample(path, number + 1000 if only_in_b else number, _CAMERAS[camera])

    images = by_key(
        (_key(camera, int(match[1])), sample(path, int(match[1]), camera))
        for camera in _CAMERAS
        for path, match in named_images(folder / camera, _NAME, "person_0001.png")
    )
    splits = fixed_splits(
        "prid",
        images,
        lambda split: (
            [_key(camera, number) for number in split["train"] for camera in _CAMERAS],
            [_key("cam_a", number) for number in split["test"]],
            [_key("cam_b", number) for number in (*split["test"], *range(_IN_BOTH + 1, _IN_B + 1))],
        ),
    )
    return ReIDDataset(name, folder, test=tuple(images.values()), variant=variant, splits=splits)


def _key(camera: str, number: int) -> str:
    return f"{camera}/person_{number:04}"


def _find(folder: Path) -> Path | None:
    def holds(place: Path) -> bool:
        return all(are_named(place / camera, _NAME) for camera in _CAMERAS)

    inside = ("single_shot", "prid_2011/single_shot", "prid2011/single_shot", "prid/single_shot")
    return locate(folder, holds, (*inside, "prid2011/prid_2011/single_shot"), tuple(_CAMERAS))


PRID = KnownDataset(
    name="prid",
    title="PRID",
    find=_find,
    read=read_prid,
    counts={"": {"test": Counts(934, 2, 1134)}},
    source="Hirzer et al., SCIA 2011 (385 people in camera a, 749 in camera b, 200 in both)",
    origin="the Institute of Computer Graphics and Vision, Graz University of Technology, PRID 2011",
    note="The single-shot version of the protocols; Table III's 24541 images are those of the multi-shot version.",
)
