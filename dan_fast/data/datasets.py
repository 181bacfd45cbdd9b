"""One door to every dataset: `load_dataset` finds out how a path is laid out and reads it."""

from __future__ import annotations

from pathlib import Path

from dan_fast.data.manifest import read_manifest
from dan_fast.data.market1501 import PARTS, is_market1501, read_market1501
from dan_fast.data.samples import ReIDDataset, Sample
from dan_fast.errors import DanFastError

__all__ = ["ReIDDataset", "Sample", "load_dataset"]

MANIFEST = "manifest.csv"


def load_dataset(path: str | Path, name: str | None = None) -> ReIDDataset:
    """Reads the dataset at a path: a Market-1501 folder, a folder with a manifest.csv, or a .csv manifest.

    The order of the samples depends on the files alone: by name in a Market-1501 folder, by row in a
    manifest. A split that is absent is empty; whoever needs it says so.

    Args:
        path: folder or manifest.
        name: what to call the dataset; by default the folder's name, or the manifest's where it has one of
            its own.

    Raises:
        DanFastError: nothing at the path, a folder above or inside a dataset, or a dataset with mistakes in
            it.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp(), "tiny", "bounding_box_train")
        >>> folder.mkdir(parents=True)
        >>> Image.new("RGB", (4, 8)).save(folder / "0007_c2s1_000001_00.jpg")
        >>> dataset = load_dataset(folder.parent)
        >>> dataset.name, dataset.train[0].pid, dataset.train[0].camid, dataset.query
        ('tiny', 7, 2, ())
    """
    path = Path(path).expanduser()
    try:
        return _load(path, name)
    except OSError as error:
        raise DanFastError(
            f"The dataset at {path} cannot be read ({error.strerror}: {error.filename}); check permissions."
        ) from error


def _load(path: Path, name: str | None) -> ReIDDataset:
    if not path.exists():
        raise DanFastError(f"There is no dataset at {path}; check the path for a typing mistake.")
    if path.is_file():
        if path.suffix.lower() != ".csv":
            raise DanFastError(f"{path} is a file but no .csv manifest; give a dataset's folder or its manifest.")
        own_name = path.parent.absolute().name if path.name == MANIFEST else path.stem
        return read_manifest(path, name or own_name)
    name = name or path.absolute().name
    if (path / MANIFEST).is_file():
        return read_manifest(path / MANIFEST, name)
    if is_market1501(path):
        return read_market1501(path, name)
    raise DanFastError(_where_it_is(path))


def _where_it_is(path: Path) -> str:
    parent = path.absolute().parent
    if path.absolute().name in PARTS.values() and is_market1501(parent):
        return f"{path} is only one part of the Market-1501 folder {parent}; give that folder instead."
    if (parent / MANIFEST).is_file():
        return f"{path} seems to hold the images of the manifest {parent / MANIFEST}; give {parent} instead."
    inside = [
        str(child)
        for child in sorted(path.iterdir())
        if child.is_dir() and ((child / MANIFEST).is_file() or is_market1501(child))
    ]
    if inside:
        which = "one of these" if len(inside) > 1 else "that one"
        return f"{path} is the folder above {' and '.join(inside)}; give {which} instead."
    return (
        f"{path} holds no dataset: neither {', '.join(PARTS.values())} (the Market-1501 layout) nor a "
        f"{MANIFEST} (columns path,pid,camid,split); give a folder that has one of them."
    )
