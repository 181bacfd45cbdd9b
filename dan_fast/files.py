"""Files that are whole or not there."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from dan_fast.errors import DanFastError


def write_whole(path: str | Path, write: Callable[[IO[bytes]], None]) -> None:
    """Have `write` fill a file beside `path`, sync it, then put it in the place of `path`.

    A process that is killed leaves the old file as it was; the next write takes the remains of the new one.

    Raises:
        DanFastError: the disk is full or the folder cannot be written; an earlier file at `path` is intact.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_whole(path, lambda stream: stream.write(b"done"))
        >>> path.read_text()
        'done'
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    # torch.save turns the stream's OSError into a RuntimeError while it closes the archive.
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise DanFastError(
            f"{path} could not be written ({cause.strerror or cause}); a previous one, if any, is intact: "
            "make room or choose another folder."
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` for text, in UTF-8."""
    write_whole(path, lambda stream: stream.write(text.encode()))


def _sync_folder(folder: Path) -> None:
    # Without this a power cut could forget the rename though the file's bytes are safe.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
