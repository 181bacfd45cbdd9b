"""Files that are whole or not there, and folders that one process at a time writes to."""

import errno
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from dan_fast.core.errors import DanFastError

# Where a file system knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
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


@contextmanager
def alone(lock_file: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same lock file, which is made, and removed at the end.

    The system lets go of the lock when a process is killed; workers that outlive it do not hold it. A file system
    without locks is taken as it is.

    Raises:
        DanFastError: another process is inside, the sentence says which one; or the file cannot be made.
    """
    lock, holder, folder = FileLock(lock_file), lock_file.with_suffix(".holder"), lock_file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DanFastError(
            f"{folder} is in use by {_said(holder)}: wait for it, stop it, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise DanFastError(
                f"{folder} cannot be written ({error.strerror or error}): choose another folder."
            ) from error
    try:
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        # The lock file last, and before it is free: who opens it now sees that it is gone.
        for file in (holder, lock_file):
            with suppress(OSError):
                file.unlink()
        lock.release()


def _said(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "another process"


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
