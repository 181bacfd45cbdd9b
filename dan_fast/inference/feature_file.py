"""Features of many images in one file, which is whole or not there, and goes on where it was stopped."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np
import torch

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import alone, remove_unfinished, write_whole
from dan_fast.core.float32 import float32_rounding
from dan_fast.core.optional import optional
from dan_fast.data.images.cache_header import digest, status_of
from dan_fast.data.images.reading import DECODED_BY
from dan_fast.data.samples import Sample
from dan_fast.inference.extractor import FeatureExtractor, Show
from dan_fast.inference.sources import Part, samples_of

# A chunk is so many batches: what a process that is stopped or killed has to do again.
_BATCHES = 8
# Part of every chunk's name, to be raised with every change of what is in one.
_FORMAT = 2


def require_format(out: Path) -> None:
    """Refuse a file that could not be written at the end.

    Raises:
        DanFastError: a folder, a name that ends in neither .npz nor .parquet, a Parquet file without pyarrow, or a file
            of somebody's own.
    """
    if out.is_dir():
        raise DanFastError(f"{out} is a folder: name a file in it, such as {out / 'features.npz'}.")
    if out.suffix not in _WRITERS:
        raise DanFastError(f"{out} ends in neither {' nor '.join(_WRITERS)}: name a file that does.")
    if out.suffix == ".parquet":
        _parquet()
    if out.is_file() and not _is_own(out):
        raise DanFastError(f"{out} holds no features of this command: name another file, or remove this one.")


def _is_own(out: Path) -> bool:
    """Whether a file is empty or has the columns that `write_features` writes."""
    if not out.stat().st_size:
        return True
    try:
        if out.suffix == ".parquet":
            names = set(_parquet().read_schema(out).names)
        else:
            with zipfile.ZipFile(out) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
    # Of a file that is none of these, by pyarrow's errors too, which are ValueErrors.
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return names >= {"features", "paths", "pids", "camids"}


def _require_utf8(names: Sequence[str]) -> None:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DanFastError(
                f"The name {name!r} is not UTF-8, of which Parquet's texts are: rename it, or write a .npz file."
            ) from error


def chunk_folder(out: Path) -> Path:
    """Where the features lie that are done, as long as the file is not."""
    return out.with_name(f"{out.name}.part")


def write_features(out: Path, extractor: FeatureExtractor, parts: Sequence[Part], progress: Show) -> list[Path]:
    """Write the features of images, and what is known of these, into a .npz or .parquet file.

    It holds, each with N rows in the order of the images, `features`, (N,C) float32 of length 1; `paths`; `pids` and
    `camids`, int64, -1 where they are unknown; `splits` and `datasets`, the titles of these, "" where there is none;
    and `weights`, `FeatureExtractor.weights`: features of other weights cannot be compared. In a Parquet file
    `features` is a column of lists of C numbers.

    What is done lies in `chunk_folder` until everything is done. Another call continues from there; features of images
    that have changed since, of other weights, of another batch size or of another version of Pillow, torchvision or
    PyTorch are made anew.

    Args:
        out: the file; see `require_format`.
        extractor: with `broken_images` "skip" the features of images that cannot be decoded are NaN.
        parts: the images; batches do not reach beyond a part.
        progress: called with (images done, images in all).

    Returns:
        The images that could not be decoded.

    Raises:
        DanFastError: see `require_format`; a name that Parquet cannot hold; an image that cannot be decoded; another
            process is writing the same file, or a full disk. A file that was there before stays as it was.
    """
    require_format(out)
    samples = samples_of(parts)
    if out.suffix == ".parquet":
        _require_utf8([*(str(sample.path) for sample in samples), *map(_title, parts)])
    folder = chunk_folder(out)
    try:
        with alone(folder / ".lock"):
            remove_unfinished(out.parent, re.escape(out.name))
            remove_unfinished(folder)
            chunks = _chunks(folder, extractor, parts, progress)
            columns = {
                "paths": np.array([str(sample.path) for sample in samples]),
                "pids": np.array([sample.pid for sample in samples], dtype=np.int64),
                "camids": np.array([sample.camid for sample in samples], dtype=np.int64),
                "splits": np.array([part.split for part in parts for _ in part.samples]),
                # A pid names a person within its dataset only.
                "datasets": np.array([_title(part) for part in parts for _ in part.samples]),
                "weights": np.full(len(samples), extractor.weights),
            }
            unread = np.concatenate([np.isnan(np.load(chunk, mmap_mode="r")[:, 0]) for chunk in chunks])
            write_whole(out, lambda stream: _WRITERS[out.suffix](stream, chunks, extractor.size, columns))
            for file in folder.iterdir():
                # Chunks, also those of files that have changed since.
                if re.fullmatch(r"[0-9a-f]{32}\.npy", file.name):
                    with suppress(OSError):
                        file.unlink()
    finally:
        # One without any chunk is of no use.
        with suppress(OSError):
            folder.rmdir()
    return [samples[place].path for place in np.flatnonzero(unread)]


def _title(part: Part) -> str:
    return "" if part.dataset is None else part.dataset.title


def _chunks(folder: Path, extractor: FeatureExtractor, parts: Sequence[Part], progress: Show) -> list[Path]:
    """The files of consecutive features, those that are missing made first."""
    made_by = (
        _FORMAT,
        DECODED_BY,
        torch.__version__,
        extractor.device.type,
        float32_rounding(extractor.device),
        extractor.batch_size,
        extractor.weights,
    )
    step = _BATCHES * extractor.batch_size
    total, done, files = sum(len(part.samples) for part in parts), 0, []
    for samples in (part.samples for part in parts):
        shares = [samples[first : first + step] for first in range(0, len(samples), step)]
        names = [folder / f"{_key(made_by, share)}.npy" for share in shares]
        kept = next((place for place, name in enumerate(names) if not _is_done(name, extractor)), len(names))
        done += sum(map(len, shares[:kept]))
        batches = extractor.batches([sample.path for sample in samples[kept * step :]])
        for name in names[kept:]:
            rows = []
            for features in islice(batches, _BATCHES):
                rows.append(features)
                done += len(features)
                progress(done, total)
            content = torch.cat(rows).numpy()
            write_whole(name, lambda stream, content=content: np.save(stream, content))
        files += names
    return files


def _key(made_by: tuple[object, ...], samples: Sequence[Sample]) -> str:
    """A name that features have only if they are of the same files by the same network."""
    images = [(str(sample.path), *status_of(str(sample.path))) for sample in samples]
    return digest(repr((made_by, images)).encode()).hex()


def _is_done(chunk: Path, extractor: FeatureExtractor) -> bool:
    # An image that an earlier call skipped has to be an error where nothing is skipped.
    skips = extractor.broken_images == "skip"
    try:
        features = np.load(chunk, mmap_mode="r")
        return features.ndim == 2 and (skips or not np.isnan(features[:, 0]).any())
    except (OSError, ValueError, EOFError):
        # None, or one that is cut short.
        return False


def _write_npz(stream: IO[bytes], chunks: Sequence[Path], size: int, columns: dict[str, np.ndarray]) -> None:
    # As numpy.savez does, which would take all features at once.
    with zipfile.ZipFile(stream, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(columns["paths"]), size)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(np.load(chunk).data)
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, column, allow_pickle=False)


def _write_parquet(stream: IO[bytes], chunks: Sequence[Path], size: int, columns: dict[str, np.ndarray]) -> None:
    import pyarrow

    feature = pyarrow.list_(pyarrow.float32(), size)
    first = 0
    writer = None
    for chunk in chunks:
        rows = np.load(chunk)
        content = {"features": pyarrow.FixedSizeListArray.from_arrays(rows.ravel(), type=feature)}
        content |= {name: column[first : first + len(rows)] for name, column in columns.items()}
        table = pyarrow.table(content)
        writer = writer or _parquet().ParquetWriter(stream, table.schema)
        writer.write_table(table)
        first += len(rows)
    writer.close()


def _parquet() -> ModuleType:
    for module in ("pyarrow", "pyarrow.parquet"):
        found = optional(
            module, "Parquet files need pyarrow: pip install 'dan-fast[parquet]', or name a file that ends in .npz."
        )
    return found


_WRITERS: dict[str, Callable[[IO[bytes], Sequence[Path], int, dict[str, np.ndarray]], None]] = {
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
