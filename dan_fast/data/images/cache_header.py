"""The header of a cache of images: sizes, times and hashes of the files read and of the pixels written."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dan_fast.core.files import write_whole
from dan_fast.data.images.reading import unreadable

DIGEST_SIZE = 16


class Source(NamedTuple):
    """An image file: (size, modification time in ns), hash of its content, why it is broken. Unreadable: -1, zeros."""

    status: tuple[int, int]
    digest: bytes
    error: str | None = None


class Header(NamedTuple):
    """What a file of cached images was made of.

    Attributes:
        sources: (n,2) int64, size and modification time of each image file.
        digests: (n,16) uint8, hash of its content.
        rows: (n,16) uint8, hash of its pixels in the file.
        written: modification time of the file.
        made_by: the libraries that decoded and resized.
        broken: row -> sentence for images that cannot be decoded.
    """

    sources: np.ndarray
    digests: np.ndarray
    rows: np.ndarray
    written: int
    made_by: str
    broken: dict[int, str]


def status_of(name: str) -> tuple[int, int]:
    """Size and modification time in ns, without opening the file; -1 where there is none."""
    try:
        status = os.stat(name)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read_source(name: str) -> tuple[Source, bytes | None]:
    """A file, and its content where it can be read."""
    try:
        with open(name, "rb") as stream:
            # Of the open file, and before it is read: a later change is seen as one.
            status = os.fstat(stream.fileno())
            content = stream.read()
    except OSError as error:
        return Source((-1, -1), bytes(DIGEST_SIZE), str(unreadable(Path(name), error))), None
    return Source((status.st_size, status.st_mtime_ns), digest(content)), content


def digest(content: bytes | np.ndarray) -> bytes:
    """A hash of some bytes or of the numbers of a contiguous array."""
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest()


def as_rows(digests: list[bytes]) -> np.ndarray:
    """Hashes as (n,16) uint8."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), DIGEST_SIZE)


def write_header(path: Path, header: Header) -> None:
    """Write a header by `write_whole`."""
    content: dict[str, Any] = header._asdict()
    content["broken"] = json.dumps(header.broken)
    write_whole(path, lambda stream: np.savez(stream, **content))


def read_header(path: Path) -> Header:
    """What `write_header` wrote; a file of anything else raises one of many kinds of exception."""
    with np.load(path, allow_pickle=False) as content:
        broken = json.loads(str(content["broken"]))
        return Header(
            content["sources"],
            content["digests"],
            content["rows"],
            int(content["written"]),
            str(content["made_by"]),
            {int(row): sentence for row, sentence in broken.items()},
        )
