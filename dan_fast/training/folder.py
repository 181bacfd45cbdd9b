"""The folder of a run, which one process at a time writes to."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dan_fast.errors import DanFastError
from dan_fast.files import remove_unfinished, write_text

# Where a file system knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def alone_in(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Inside, no other process trains in `folder`; what killed ones left unfinished there is removed.

    The system lets go of the lock when a process is killed; workers that outlive it do not hold it.

    Raises:
        DanFastError: another process trains there, the sentence says which; or the folder cannot be written.
    """
    holder, lock = folder / ".holder", FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DanFastError(
            f"{folder} is being trained in by {_said(holder)}: wait for it, stop it, or choose another run.out."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise DanFastError(
                f"{folder} cannot be written ({error.strerror or error}): choose another run.out."
            ) from error
        say(f"The file system of {folder} has no locks: take care that no other process trains there.")
    try:
        if lock.is_locked:
            remove_unfinished(folder)
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _said(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "another process"
