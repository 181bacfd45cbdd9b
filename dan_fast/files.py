"""Files that are whole or not there."""

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from dan_fast.errors import DanFastError

# What a file system answers that cannot sync, which is no reason to lose what has been written.
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def write_whole(path: str | Path, write: Callable[[IO[bytes]], None]) -> None:
    """Have `write` fill a file beside `path`, sync it, then put it in the place of `path`.

    The file beside it has a name that no other process or thread uses: of two that write the same `path` one comes
    last. A process that is killed leaves the old file as it was, and remains that `remove_unfinished` removes.

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
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("xb") as stream:
            write(stream)
            stream.flush()
            _sync(stream.fileno())
        os.replace(unfinished, path)
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
    _sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` for text, in UTF-8."""
    write_whole(path, lambda stream: stream.write(text.encode()))


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of `write_whole` in `folder`, of the files that are called `name`.

    Only for one who knows that nobody writes such files now, because of a lock.
    """
    for remains in folder.glob(f".{name}.*.part"):
        with suppress(OSError):
            remains.unlink()


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _sync_folder(folder: Path) -> None:
    # Without this a power cut could forget the rename though the file's bytes are safe. The file is in its place, so
    # a folder that cannot be opened or synced, as on some network mounts, is no error.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
