"""Files that appear whole or not at all, and folders that one process at a time writes to."""

import errno
import json
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from dan_fast.core.errors import DanFastError

# The errors of a file system without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
# The errors of a file system that cannot sync; what has been written is kept.
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def absolute(path: str | Path) -> str:
    """The path from the root, as the system follows it: what stands before a `..` may be a link.

    Example:
        >>> absolute("/a/./b.jpg")
        '/a/b.jpg'
    """
    if ".." not in os.fspath(path).split(os.sep):
        return os.path.abspath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def write_whole(path: str | Path, write: Callable[[IO[bytes]], None]) -> None:
    """Have `write` fill a file beside `path`, sync it, then put it in the place of `path`.

    The file beside it has a name that no other process or thread uses: of two that write the same `path` the later
    one wins. A process that is killed leaves the old file as it was, and remains that `remove_unfinished` removes.

    Raises:
        DanFastError: the disk is full or the folder cannot be written; an earlier file at `path` is intact.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_whole(path, lambda stream: stream.write(b"done"))
        >>> path.read_text()
        'done'
    """
    write_together({Path(path): write})


def write_together(files: Mapping[Path, Callable[[IO[bytes]], None]]) -> None:
    """`write_whole` of several files of one folder: the first is put in its place when all are on the disk.

    Raises:
        DanFastError: see `write_whole`; the earlier files are intact, but for those before one that cannot be replaced.
    """
    beside = {path: path.with_name(f".{path.name}.{secrets.token_hex(8)}.part") for path in files}
    try:
        for path, unfinished in beside.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("xb") as stream:
                files[path](stream)
                stream.flush()
                _sync(stream.fileno())
        for path, unfinished in beside.items():
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
        for unfinished in beside.values():
            with suppress(OSError):
                unfinished.unlink()
    _sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` for text, in UTF-8; what of a file's name is none is written as U+FFFD."""
    write_whole(path, lambda stream: stream.write(printable(text).encode()))


def printable(text: str) -> str:
    """A text of file names with U+FFFD in the place of bytes that are no UTF-8, which Python has as surrogates.

    Example:
        >>> printable(os.fsdecode(bytes([99, 97, 233]))) == "ca\N{REPLACEMENT CHARACTER}"
        True
    """
    return text.encode(errors="surrogateescape").decode(errors="replace")


def require_writable(path: str | Path) -> None:
    """Refuse a file that `write_whole` could not write, before the work is done whose result it is to hold.

    Raises:
        DanFastError: the path is a folder, a pipe or a device, or its folder can be neither written nor made.

    Example:
        >>> import tempfile
        >>> require_writable(Path(tempfile.mkdtemp()) / "new" / "figures.json")
    """
    place = Path(path).absolute()
    try:
        is_folder = place.is_dir()
        folder = next((each for each in place.parents if each.exists()), place.parent)
        # By a file without a name: rights alone do not say whether a mount takes one.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DanFastError(f"{path} could not be written ({error.strerror}): choose another folder.") from error
    if is_folder:
        raise DanFastError(f"{path} is a folder: name a file in it.")
    if place.exists() and not place.is_file():
        # A pipe would be waited for, and a device would be replaced by a file.
        raise DanFastError(f"{path} is no ordinary file: name another one.")


def require_own_json(path: str | Path, keys: Collection[str]) -> None:
    """Refuse a file of somebody's own where a command is to write its JSON.

    Args:
        path: of the file, which need not be there.
        keys: of the objects that the command writes, alone or in a list.

    Raises:
        DanFastError: see `require_writable`; or the file holds something else.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "figures.json"
        >>> for own in ("", '[{"rows": [], "of": "a newer version"}]'):
        ...     _ = file.write_text(own)
        ...     require_own_json(file, ["rows"])
    """
    require_writable(path)
    try:
        text = Path(path).read_bytes()
    except OSError:
        return  # not there, or for the writer to say
    try:
        content = json.loads(text or "[]")
    except (ValueError, RecursionError):
        content = None
    objects = content if isinstance(content, list) else [content]
    if not all(isinstance(each, dict) and each.keys() >= set(keys) for each in objects):
        raise DanFastError(f"{path} was not written by this command: name another file, or remove this one.")


def remove_unfinished(folder: Path, names: str = ".*") -> None:
    """Remove what killed processes left of `write_whole` in `folder`, of files whose names a regular expression fits.

    To be called under a lock that keeps other processes from writing such files.
    """
    for remains in folder.glob(".*.part"):
        if re.fullmatch(rf"\.(?:{names})\.[0-9a-f]+\.part", remains.name):
            with suppress(OSError):
                remains.unlink()


@contextmanager
def alone(lock_file: Path) -> Iterator[None]:
    """A context that one process at a time enters for a lock file, which is made, and removed at the end.

    The system releases the lock when a process is killed; workers that outlive it do not hold it. On a file system
    without locks nothing is locked.

    Raises:
        DanFastError: another process holds the lock, the sentence names it; or the file cannot be made.
    """
    lock, holder, folder = FileLock(lock_file), _holder(lock_file), lock_file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DanFastError(
            f"{folder} is in use by {holder_of(lock_file)}: wait for it, stop it, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise DanFastError(
                f"{folder} cannot be written ({error.strerror or error}): choose another folder."
            ) from error
    try:
        # Where there is no room for it, what is locked for says so of a file that matters.
        with suppress(DanFastError):
            write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        # The lock file last, and before its lock is released: a process that opens it later makes a new one.
        for file in (holder, lock_file):
            with suppress(OSError):
                file.unlink()
        lock.release()


def holder_of(lock_file: Path) -> str:
    """The process that holds a lock of `alone`, in words, as the file beside the lock names it."""
    try:
        return _holder(lock_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "another process"


def _holder(lock_file: Path) -> Path:
    return lock_file.with_suffix(".holder")


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _sync_folder(folder: Path) -> None:
    # Without this a power cut could undo the rename although the file's bytes are on the disk. The file is in its
    # place, so a folder that cannot be opened or synced, as on some network mounts, is no error.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
