"""Images decoded once: memory-mapped files of resized uint8 images, checked against what they were made of."""

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import ImageFile
from torch import Tensor
from torch.utils.data import Dataset

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import absolute, remove_unfinished, write_whole
from dan_fast.core.home import expanded
from dan_fast.data.images.cache_header import (
    Header,
    Source,
    as_rows,
    digest,
    read_header,
    read_source,
    status_of,
    write_header,
)
from dan_fast.data.images.packed import Packed
from dan_fast.data.images.reading import DECODED_BY, decode_image, read_image
from dan_fast.data.images.transforms import resize
from dan_fast.data.images.workers import SentenceLoader

Check = Literal["quick", "full"]
Say = Callable[[str], None]
NO_CACHE, USER_CACHE = "none", "user"

_LOG = logging.getLogger(__name__)
# Part of every name: to be raised with every change of the pixels or of the file format.
_FORMAT = 3
_BATCH = 32


def cache_folder(setting: str) -> Path | None:
    """The folder a setting names: None for "none", the user's cache folder for "user", else the path given.

    The user's is `dan-fast` in `$XDG_CACHE_HOME`, or in `~/.cache` where that is not set.

    Raises:
        DanFastError: nothing is named, as by a variable of the shell that is not set; or there is no home folder.

    Example:
        >>> cache_folder("none"), cache_folder("/scratch/images")
        (None, PosixPath('/scratch/images'))
    """
    if setting == NO_CACHE:
        return None
    if not setting:
        raise DanFastError(f"The folder of the cache is empty: name one, {USER_CACHE} or {NO_CACHE}.")
    if setting != USER_CACHE:
        return expanded(setting)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a path that is not absolute is to be ignored.
    if os.path.isabs(base):
        return Path(base) / "dan-fast"
    home = expanded("~")
    if not home.is_absolute():
        raise DanFastError("There is no home folder to keep a cache in: set XDG_CACHE_HOME, or name the folder.")
    return home / ".cache" / "dan-fast"


class ImageCache:
    """Decoded and resized images in memory-mapped files.

    A set of images (the paths of one dataset's train split, say) at one size is a file `<key>.npy`, (n,3,H,W) uint8,
    which `numpy.load` opens too, and a header `<key>.npz`; the key is a hash of the absolute paths, the size and the
    interpolation. Each opening of a set checks sizes and modification times of the images and of the file against the
    header. Where one differs, contents are compared: images that were only touched keep their pixels; any other change
    makes the set anew, and so do other versions of Pillow or torchvision. `check="full"` compares all contents, of the
    images and of every row of the file, and so finds damage that left the modification time as it was.

    One process makes a set while others that need it wait. What a killed process leaves is never read. A file in use
    may be replaced or deleted: processes that have opened it go on with what they opened. To free the space, delete the
    folder.

    Args:
        folder: where the files lie; made if need be.
        image_size: (height, width) to which images are resized.
        check: "quick" or "full", see above.
        workers: processes that decode; 0 decodes in this one.
        say: called with a sentence on every long step and its reason; by default it is logged.
        interpolation: the interpolation with which they are resized, see `dan_fast.core.preprocessing.Preprocessing`.

    Raises:
        DanFastError: an unknown `check` or an invalid size.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 16), "red").save(folder / "red.png")
        >>> cache = ImageCache(folder / "cache", (4, 2), say=print)
        >>> cache.add([folder / "red.png"])  # doctest: +ELLIPSIS
        Decoding 1 image into /...npy, 24 bytes.
        >>> cache.read(folder / "red.png")[:, 0, 0].tolist()
        [255, 0, 0]
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: tuple[int, int],
        check: Check = "quick",
        workers: int = 0,
        say: Say = _LOG.warning,
        interpolation: str = "bilinear",
    ) -> None:
        if check not in ("quick", "full"):
            raise DanFastError(f"The check of the cache is {check!r}; set it to quick or full.")
        self.folder = Path(os.path.abspath(expanded(folder)))
        self.check = check
        self.workers = workers
        self.say = say
        self._resize = resize(image_size, interpolation)
        self.image_size = tuple(image_size)
        self.interpolation = interpolation
        self._places: dict[str, tuple[Tensor, int]] = {}
        self._broken: dict[str, str] = {}

    @classmethod
    def of_setting(cls, setting: str, *arguments: Any, **options: Any) -> "ImageCache | None":
        """A cache in the folder that `cache_folder` gives for a setting; None where that is none."""
        folder = cache_folder(setting)
        return None if folder is None else cls(folder, *arguments, **options)

    def __contains__(self, path: str | Path) -> bool:
        return absolute(path) in self._places

    def add(self, paths: Sequence[str | Path]) -> None:
        """Open the file of a set of images; decode the set first if there is no valid file.

        What was opened before is not checked again: take another object for images that have changed since.

        An image that cannot be decoded is recorded and raises when it is read.

        Raises:
            DanFastError: the folder cannot be used or is full; what was there stays as it was.
        """
        names = list(dict.fromkeys(absolute(path) for path in paths))
        if not names or all(name in self._places for name in names):
            return
        opened = self._open(names)
        images = torch.from_numpy(opened.images)
        for row, name in enumerate(names):
            self._places[name] = images, row
            self._broken.pop(name, None)
        self._broken.update((names[row], sentence) for row, sentence in opened.header.broken.items())

    def read(self, path: str | Path) -> Tensor:
        """The (3,H,W) uint8 image, a view of the file.

        Raises:
            DanFastError: an image that cannot be decoded, as `read_image` puts it.
            KeyError: an image that is in no set that was added.
        """
        name = absolute(path)
        if name in self._broken:
            raise DanFastError(self._broken[name])
        images, row = self._places[name]
        return images[row]

    def _open(self, names: list[str]) -> "_Opened":
        made = [_FORMAT, self.image_size, names]
        # Bilinear is left out: so the key of a cache that names no interpolation is that of a bilinear one.
        if self.interpolation != "bilinear":
            made.append(self.interpolation)
        key = digest(repr(tuple(made)).encode()).hex()
        file, header = self.folder / f"{key}.npy", self.folder / f"{key}.npz"
        found = self._inspect(file, header, names, self.check)
        if isinstance(found, _Opened) and not found.touched:
            return found
        try:
            with self._alone(key):
                # Another process may have made the set before this one held the lock.
                found = self._inspect(file, header, names, self.check)
                if isinstance(found, str):
                    remove_unfinished(self.folder, rf"{key}\..*")
                    self._build(file, header, names, why=found)
                    found = self._inspect(file, header, names, "quick", again=False)
                elif found.touched:
                    write_header(header, found.header)
        except DanFastError:
            # A read-only folder is enough where all contents are unchanged.
            if isinstance(found, str):
                found = self._inspect(file, header, names, self.check, again=False)
            if isinstance(found, str):
                raise
        if isinstance(found, str):
            raise DanFastError(f"The cache {file} changes while it is made ({found}); let nothing write to the images.")
        return found

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Inside, no other process makes this set; the system releases the lock when a process is killed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self.say(f"Waiting for another process that decodes images into {self.folder}.")
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            raise DanFastError(
                f"The cache folder {self.folder} cannot be written ({getattr(error, 'strerror', None) or error}); "
                "choose another folder for the cache, or none."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _inspect(
        self, file: Path, header_file: Path, names: list[str], check: Check, again: bool = True
    ) -> "_Opened | str":
        """The set if it can be used, else why not: "" where there is none.

        With `again` broken images are tried once more.
        """
        shape = (len(names), 3, *self.image_size)
        try:
            header = read_header(header_file)
            status = file.stat()
            # Copy on write: PyTorch requires writable memory; it is never written to.
            images = np.load(file, mmap_mode="c", allow_pickle=False)
        except FileNotFoundError:
            return "" if not file.exists() and not header_file.exists() else f"a part of {file} is missing"
        # A file of another kind raises many kinds of exception, zipfile's and pickle's too.
        except Exception as error:
            return f"{file} or its header is corrupt: {' '.join(str(error).split())}"
        shapes = [part.shape for part in (header.sources, header.digests, header.rows)]
        if images.shape != shape or images.dtype != np.uint8:
            return f"{file} is corrupt: it holds {images.dtype} {images.shape} and not uint8 {shape}"
        if shapes != [(len(names), each) for each in (2, 16, 16)]:
            return f"{header_file} is corrupt: its tables are of {shapes}"
        if status.st_size != images.offset + images.nbytes:
            return f"{file} is corrupt: it has {status.st_size} bytes and not {images.offset + images.nbytes}"

        if header.made_by != DECODED_BY:
            return f"they are of {header.made_by} and this is {DECODED_BY}"

        current = np.array([status_of(name) for name in names], dtype=np.int64)
        changed, before = (current != header.sources).any(1), header.sources.copy()
        for row in np.flatnonzero(changed) if check == "quick" else range(len(names)):
            source, _ = read_source(names[row])
            if source.digest != header.digests[row].tobytes():
                return f"{names[row]} has changed since it was decoded"
            header.sources[row] = source.status
        for row in header.broken if again else ():
            # Pillow may have been told since to take a truncated file, or have found a decoder.
            with suppress(DanFastError):
                read_image(Path(names[row]))
                return f"{names[row]} can be decoded by now"
        touched = bool((header.sources != before).any())
        if check == "full" or status.st_mtime_ns != header.written:
            damaged = [row for row, image in enumerate(images) if digest(image) != header.rows[row].tobytes()]
            if damaged:
                return f"{file} is corrupt: {_count(len(damaged))} of {len(names)} differ from what was written"
            touched |= status.st_mtime_ns != header.written
            header = header._replace(written=status.st_mtime_ns)
        return _Opened(images, header, touched)

    def _build(self, file: Path, header_file: Path, names: list[str], why: str) -> None:
        shape = (len(names), 3, *self.image_size)
        if why:
            self.say(f"The cached images are made anew: {why}.")
        size, free = math.prod(shape), shutil.disk_usage(self.folder).free
        if size > free:
            raise DanFastError(
                f"The cache of {_count(len(names))} needs {_size(size)} and {self.folder} has {_size(free)} left: "
                "make room, choose another folder for the cache, or none."
            )
        self.say(f"Decoding {_count(len(names))} into {file}, {_size(size)}.")
        loader = SentenceLoader(_Decoding(names, self._resize), list, self.workers, batch_size=_BATCH)
        sources: list[Source] = []
        rows: list[bytes] = []

        def write(stream: IO[bytes]) -> None:
            np.lib.format.write_array_header_1_0(
                stream,
                {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape},
            )
            blank = torch.zeros(shape[1:], dtype=torch.uint8)
            for batch in loader:
                for image, source in batch:
                    pixels = (blank if image is None else image).numpy()
                    stream.write(pixels.data)
                    sources.append(source)
                    rows.append(digest(pixels))

        write_whole(file, write)
        header = Header(
            sources=np.array([each.status for each in sources], dtype=np.int64),
            digests=as_rows([each.digest for each in sources]),
            rows=as_rows(rows),
            written=file.stat().st_mtime_ns,
            made_by=DECODED_BY,
            broken={row: each.error for row, each in enumerate(sources) if each.error is not None},
        )
        write_header(header_file, header)


class _Opened(NamedTuple):
    images: np.ndarray
    header: Header
    # Contents are as they were, modification times are not: the header is to be written again.
    touched: bool


class _Decoding(Dataset):
    def __init__(self, names: Sequence[str], transform: Callable[[Tensor], Tensor]) -> None:
        self.names = Packed(names)
        self.transform = transform
        self.takes_truncated = ImageFile.LOAD_TRUNCATED_IMAGES

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor | None, Source]:
        """The image, None where it is broken, and what it is of."""
        name, image = self.names[index], None
        # As in the process that asks, which a worker that was not forked does not know.
        ImageFile.LOAD_TRUNCATED_IMAGES = self.takes_truncated
        source, content = read_source(name)
        if content is not None:
            try:
                image = self.transform(decode_image(content, Path(name))).contiguous()
            except DanFastError as error:
                source = source._replace(error=str(error))
        return image, source


def _count(images: int) -> str:
    return f"{images} image{'s' * (images != 1)}"


def _size(size: int) -> str:
    return f"{size} bytes" if size < 10**6 else f"{size / 10**6:.1f} MB" if size < 10**9 else f"{size / 10**9:.1f} GB"
