"""Finding a dataset's own folder from a folder one level above it, from itself, or from one level inside it."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from dan_fast.core.errors import DanFastError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff", ".webp", ".jfif"}


def locate(
    folder: Path, holds: Callable[[Path], bool], names: Sequence[str] = (), parts: Sequence[str] = ()
) -> Path | None:
    """The folder that `holds` accepts: `folder`, one of `names` below it, or its parent if it is one of `parts`.

    Args:
        folder: where to look from.
        holds: whether a folder is the dataset's own.
        names: paths below a folder, as the code bases and archives name them; letter case does not matter.
        parts: names of the dataset's own subfolders; from one of them the folder above is found.

    Example:
        >>> import tempfile
        >>> images = Path(tempfile.mkdtemp(), "viper", "VIPeR", "cam_a")
        >>> images.mkdir(parents=True)
        >>> found = locate(images.parents[1], lambda folder: (folder / "cam_a").is_dir(), ["VIPeR"], ["cam_a"])
        >>> found == images.parent == locate(images, lambda folder: (folder / "cam_a").is_dir(), [], ["cam_a"])
        True
    """
    if not folder.is_dir():
        return None
    if holds(folder):
        return folder
    for name in names:
        below = _descend(folder, name)
        if below is not None and holds(below):
            return below
    if folder.absolute().name.lower() in {part.lower() for part in parts} and holds(folder.absolute().parent):
        return folder.absolute().parent
    return None


def _descend(folder: Path, name: str) -> Path | None:
    for step in Path(name).parts:
        matches = sorted(child for child in folder.iterdir() if child.name.lower() == step.lower() and child.is_dir())
        if not matches:
            return None
        folder = matches[0]
    return folder


def image_files(folder: Path) -> list[Path]:
    """The files of a folder that are named like images, by name, hidden ones not; none where the folder is absent."""
    if not folder.is_dir():
        return []
    # Sorted by name: the order of a directory listing differs between file systems.
    # macOS puts a hidden ._0001.jpg beside each 0001.jpg that it writes to a file system of others.
    files = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
    return sorted(files, key=lambda path: path.name)


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """Those that are not there."""
    # Each folder is listed once: testing each of 126,441 files takes seconds, on a network drive minutes.
    listed = cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
    return [path for path in paths if os.path.basename(path) not in listed(os.path.dirname(path))]


def images_below(folder: Path, leave_out: Callable[[Path], bool] = lambda place: False) -> list[Path]:
    """All files in a folder, and in those below it, that are named like images, hidden ones left out, by name.

    Links to folders are followed; a folder that several paths lead to has one, that through no link where there is one.
    Folders below it that `leave_out` accepts are passed over.

    Raises:
        DanFastError: there is none, or a folder cannot be read.
    """
    files, seen, starts = [], set(), [folder]
    # Links to folders come after all that is no link: what both name has its own path, and one to a folder above ends.
    for start in starts:
        for place, folders, names in os.walk(start, onerror=_refuse):
            real = os.path.realpath(place)
            if real in seen or (Path(place) != folder and leave_out(Path(place))):
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [path for name in folders if (path := Path(place, name)).is_symlink()]
            found = (Path(place, name) for name in names if not name.startswith("."))
            files += [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DanFastError(f"{folder} holds no image (a file named {suffixes}) and no dataset; name another folder.")
    return sorted(files)


def _refuse(error: OSError) -> None:
    raise DanFastError(f"{error.filename} cannot be read ({error.strerror}); check permissions.") from error
