"""CUHK-SYSU: a person search set of street snaps and films; for ReID the crops of its people are used."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from dan_fast.core.errors import DanFastError
from dan_fast.data.datasets.extraction import save_image, whole_folder
from dan_fast.data.datasets.file_names import are_named, named_images
from dan_fast.data.datasets.finding import locate
from dan_fast.data.samples import Counts, KnownDataset, ReIDDataset, Sample

_CROPS = "cropped_images"
_FRAMES = Path("Image", "SSM")
_PEOPLE = Path("annotation", "Person.mat")
# p11422_s16929_1.jpg: person, scene, number.
_NAME = re.compile(r"p(\d+)_s(\d+)_\d+\.")
# Every scene has a camera of its own, which is not recorded; as in the usual code bases, all have one number.
_CAMID = 1
_QUALITY = 95


def _holds(folder: Path) -> bool:
    return are_named(folder / _CROPS, _NAME) or (folder / _PEOPLE).is_file()


def _find(folder: Path) -> Path | None:
    names = ("CUHK-SYSU", "cuhk_sysu", "cuhksysu", "dataset", "CUHK-SYSU/dataset", "cuhk_sysu/dataset")
    return locate(folder, _holds, names, (_CROPS, "Image", "annotation"))


def read_cuhk_sysu(folder: Path, name: str, variant: str = "") -> ReIDDataset:
    """Reads the crops of CUHK-SYSU as a training split; it has none to evaluate on.

    Raises:
        DanFastError: the original archive, whose frames have yet to be cropped, or an image of another name.
    """
    if not (folder / _CROPS).is_dir():
        raise DanFastError(
            f"{folder} holds CUHK-SYSU as whole frames; `dan-fast datasets {folder} --extract` writes the crops "
            f"of its people into {folder / _CROPS}."
        )
    images = named_images(folder / _CROPS, _NAME, "p11422_s16929_1.jpg: person, scene, number")
    return ReIDDataset(name, folder, train=tuple(Sample(path, int(match[1]), _CAMID) for path, match in images))


def extract_cuhk_sysu(folder: Path) -> list[Path]:
    """Crops the people of the original archive into `cropped_images`, which appears whole or not at all.

    Every appearance in annotation/Person.mat becomes p<person>_s<scene>_<number>.jpg, as the code bases name
    them. Existing crops are not changed.

    Returns:
        The folders written.

    Raises:
        DanFastError: annotations that cannot be read, a box outside its frame, a frame that is absent or no
            image, crops that cannot be written.
    """
    target = folder / _CROPS
    if target.is_dir() or not (folder / _PEOPLE).is_file():
        return []
    boxes_of = _boxes(folder / _PEOPLE)
    with whole_folder(target) as unfinished:
        for frame, boxes in boxes_of.items():
            _crop(folder / _FRAMES / frame, boxes, unfinished)
    return [target]


def _boxes(file: Path) -> dict[str, list[tuple[str, list[int]]]]:
    """Of each frame the names of its crops, and left, top, width and height of each."""
    from scipy.io import loadmat

    boxes_of: dict[str, list[tuple[str, list[int]]]] = defaultdict(list)
    try:
        for person in _each(loadmat(file, simplify_cells=True)["Person"]):
            for number, scene in enumerate(_each(person["scene"]), start=1):
                frame = str(scene["imname"])
                left, top, width, height = map(int, scene["idlocate"])
                crop = f"{person['idname']}_{Path(frame).stem}_{number}.jpg"
                boxes_of[frame].append((crop, [left, top, width, height]))
        return boxes_of
    # SciPy raises many kinds of exception on files that are no MATLAB files, or damaged ones.
    except Exception as error:
        raise DanFastError(
            f"{file} cannot be read as CUHK-SYSU's annotations ({error}); unpack the original archive anew."
        ) from error


def _each(value: Any) -> list[Any]:
    """The entries of a MATLAB struct array; one of a single entry is read as that entry."""
    return [value] if isinstance(value, dict) else list(value)


def _crop(frame: Path, boxes: list[tuple[str, list[int]]], target: Path) -> None:
    try:
        with Image.open(frame) as image:
            picture = image.convert("RGB")
    except Exception as error:
        raise DanFastError(f"The frame {frame} cannot be decoded ({error}); unpack the archive anew.") from error
    for name, (left, top, width, height) in boxes:
        box = (max(left, 0), max(top, 0), min(left + width, picture.width), min(top + height, picture.height))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise DanFastError(
                f"The box {left, top, width, height} of {name} lies outside the frame {frame}; unpack the archive anew."
            )
        save_image(picture.crop(box), target / name, quality=_QUALITY)


CUHK_SYSU = KnownDataset(
    name="cuhk_sysu",
    title="CUHK-SYSU",
    find=_find,
    read=read_cuhk_sysu,
    # Table III's 8,432 people and 18,184 images are the queries of person search and the whole frames.
    counts={"": {"train": Counts(11934, None, 34574)}},
    source="the annotations of Xiao et al., CVPR 2017",
    origin="the person search page of Shuang Li and Tong Xiao, on request",
    note="It has no query and gallery of crops: it is for training only.",
    extract=extract_cuhk_sysu,
)
