"""CUHK03 as it is distributed, one MATLAB 7.3 file with all pixels in it, and the extraction of its images."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_text
from dan_fast.core.optional import optional
from dan_fast.data.datasets.extraction import save_image, whole_folder

RELEASE = "cuhk03_release"
ARCHIVE = "cuhk-03.mat"
# The first five columns of a person are from the first camera of the pair.
_FIRST_CAMERA = 5


def archive_of(folder: Path) -> Path | None:
    """The archive in a folder or in its cuhk03_release."""
    files = (folder / ARCHIVE, folder / RELEASE / ARCHIVE)
    return next((file for file in files if file.is_file()), None)


def extract_cuhk03(folder: Path) -> list[Path]:
    """Writes images_detected, images_labeled and the 20 classic splits of both, as torchreid names them.

    Each appears whole or not at all, and what already exists is not changed. The new protocol's split is not
    part of the archive.

    Args:
        folder: a folder with cuhk-03.mat in it or in its cuhk03_release.

    Returns:
        The folders and files written.

    Raises:
        DanFastError: h5py is not installed, the archive cannot be read, or the images cannot be written.
    """
    archive = archive_of(folder)
    wanted = [
        folder / name
        for box in ("detected", "labeled")
        for name in (f"images_{box}", f"splits_classic_{box}.json")
        if not (folder / name).exists()
    ]
    if archive is None or not wanted:
        return []
    h5py = optional("h5py", f"{archive} is an HDF5 file, which h5py reads: pip install h5py.")
    try:
        with h5py.File(archive, "r") as content:
            for path in wanted:
                box = path.stem.rsplit("_", 1)[1]
                if path.suffix:
                    write_text(path, json.dumps(_classic_splits(content, box, folder / f"images_{box}")))
                else:
                    _write_images(content, box, path)
    except DanFastError:
        raise
    # h5py raises many kinds of exception on a file of another kind, a truncated one, or one of other parts.
    except Exception as error:
        raise DanFastError(f"{archive} cannot be read ({error}); unpack the original archive anew.") from error
    return wanted


def _people(content: Any, box: str) -> Iterator[tuple[int, int, list[tuple[int, Any]]]]:
    """Pair, person and the (number, dataset) of each image of that person, all counted from 1."""
    for pair, reference in enumerate(content[box][0], start=1):
        for person, cells in enumerate(content[reference][:].T, start=1):
            images = [(number, content[cell]) for number, cell in enumerate(cells, start=1)]
            # An empty cell is stored as its size.
            yield pair, person, [(number, image) for number, image in images if image.ndim == 3]


def _name(pair: int, person: int, number: int) -> str:
    return f"{pair}_{person:03d}_{_camera(number)}_{number:02d}.png"


def _camera(number: int) -> int:
    return 1 if number <= _FIRST_CAMERA else 2


def _write_images(content: Any, box: str, target: Path) -> None:
    with whole_folder(target) as folder:
        for pair, person, images in _people(content, box):
            for number, pixels in images:
                # MATLAB's columns come first.
                save_image(Image.fromarray(pixels[:].transpose(2, 1, 0)), folder / _name(pair, person, number))


def _classic_splits(content: Any, box: str, images: Path) -> list[dict[str, list]]:
    people = [(pair, person, [number for number, _ in numbered]) for pair, person, numbered in _people(content, box)]
    splits = []
    for reference in content["testsets"][0]:
        test_people = {(int(pair), int(person)) for pair, person in content[reference][:].T}
        train: list[list] = []
        test: list[list] = []
        labels = {True: 0, False: 0}
        for pair, person, numbers in people:
            tested = (pair, person) in test_people
            entries = test if tested else train
            # torchreid's form: path, label from 0 within the part, camera from 0.
            for number in numbers:
                path = str(images / _name(pair, person, number))
                entries.append([path, labels[tested], _camera(number) - 1])
            labels[tested] += 1
        splits.append({"train": train, "query": test, "gallery": test})
    return splits
