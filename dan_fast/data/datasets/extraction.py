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
        DanFastError: the folder cannot be made or put in its place, or another process makes it.

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
            with _writing(target):
                unfinished.mkdir()
            yield unfinished
            with _writing(target):
                unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Save an image; options as in `PIL.Image.Image.save`.

    Raises:
        DanFastError: the disk is full, or the folder cannot be written.
    """
    with _writing(path):
        image.save(path, **options)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DanFastError(f"{path} could not be written ({reason}); make room or check permissions.") from error
