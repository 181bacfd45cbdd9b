"""Writing the images of an archive as files, into a folder that appears whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import alone


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends and is removed when the block raises.

    Raises:
        DanFastError: the folder cannot be made, or another process makes it.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp(), "images")
        >>> with whole_folder(target) as folder:
        ...     save_image(Image.new("RGB", (4, 8)), folder / "1.png")
        >>> [path.name for path in target.iterdir()]
        ['1.png']
    """
    unfinished = target.with_name(f".{target.name}.part")
    with alone(target.with_name(f".{target.name}.lock")):
        # The remains of a process that was killed.
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
        except OSError as error:
            raise _not_written(target, error) from error
        try:
            yield unfinished
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Save an image; options as in `PIL.Image.Image.save`.

    Raises:
        DanFastError: the disk is full, or the folder cannot be written.
    """
    try:
        image.save(path, **options)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> DanFastError:
    return DanFastError(f"{path} could not be written ({error.strerror or error}); make room or check permissions.")
