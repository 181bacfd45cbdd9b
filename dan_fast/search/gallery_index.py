"""The index of a gallery: a folder with features, images and faiss's index, which is extended and not rebuilt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import absolute, alone, remove_unfinished
from dan_fast.data.images.cache_header import status_of
from dan_fast.data.images.reading import DECODED_BY
from dan_fast.data.samples import Sample, real_paths
from dan_fast.inference.extractor import FeatureExtractor, Show
from dan_fast.search import kinds
from dan_fast.search.index_folder import COLUMNS, FEATURES, IndexFolder, rows_of
from dan_fast.search.kinds import IndexKind
from dan_fast.search.searcher import Found, Searcher

# So many images, and a tenth of those since the last update that was finished, are embedded before they are written
# down.
_SAVED = 4096


class Update(NamedTuple):
    """What `update_index` did.

    Attributes:
        added: images that were embedded, including changed ones.
        kept: images whose features were already there.
        changed: files that are no longer those that were embedded before.
        gone: images of the index that the gallery does not hold; they are not found.
        skipped: images that could not be decoded.
        behind: approximate kinds of the index that lack some of its images, because only `kind` is brought up to date.
        decoded_by: the versions of Pillow and torchvision that decoded and resized the images of the index, as far as
            the index says; with others, features of the same image may differ a little.
    """

    added: int
    kept: int
    changed: list[Path]
    gone: list[Path]
    skipped: list[Path]
    behind: list[str]
    decoded_by: list[str]


class GalleryIndex:
    """The images of a gallery, and a search for those that are nearest to a feature.

    Args:
        folder: the folder that `update_index` wrote; or, if it was read already, an `IndexFolder` of the same
            extractor.
        extractor: it has to be of the checkpoint that the index was made with.
        kind: one that `update_index` has made.

    Attributes:
        images: the images, by the rows that `search` gives, including those that are gone.
        parameters: of an approximate kind.
        weights: the hash of the extractor's, `weights_hash`.

    Raises:
        DanFastError: faiss is not installed, for another kind than flat; there is no finished index; one of another
            checkpoint or a newer version; or a damaged one.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from dan_fast.nn import DAN
        >>> extract = FeatureExtractor(DAN(2, "resnet18", image_size=(32, 16)), device="cpu")
        >>> folder = Path(tempfile.mkdtemp())
        >>> for colour in ("red", "green", "blue"):
        ...     Image.new("RGB", (16, 32), colour).save(folder / f"{colour}.png")
        >>> gallery = [Sample(path, -1, -1) for path in sorted(folder.glob("*.png"))]
        >>> update_index(folder / "index", extract, gallery).added
        3
        >>> index = GalleryIndex(folder / "index", extract)
        >>> found = index.search(extract(folder / "red.png").numpy(), places=2)
        >>> index.images[found.rows[0, 0]].path.name, f"{found.scores[0, 0]:.3f}"
        ('red.png', '1.000')
    """

    def __init__(self, folder: str | Path | IndexFolder, extractor: FeatureExtractor, kind: IndexKind = "flat") -> None:
        known = folder if isinstance(folder, IndexFolder) else IndexFolder(folder, extractor)
        self.weights = known.weights
        stored, index = known.read_finished(kind)
        self.parameters = {} if kind == "flat" else stored["kinds"][kind]["parameters"]
        count = len(stored["paths"])
        self.images = [
            Sample(Path(path), pid, camid)
            for path, pid, camid in zip(stored["paths"], stored["pids"], stored["camids"], strict=True)
        ]
        order = np.full(count, -1, dtype=np.int64)
        order[stored["gallery"]] = np.arange(len(stored["gallery"]))
        self._searcher = Searcher(known.features(count), order, kind, index)

    def search(self, features: np.ndarray, places: int, exact: bool = False) -> Found:
        """The images nearest to (Q,C) features of length 1; `exact` compares all features whatever the kind is.

        Features are an array or a tensor on the CPU. Beside its result, the search needs memory for about a thousand
        queries, however many there are.

        Raises:
            ValueError: features of another shape or not finite, like those of images that could not be decoded; or a
                number of places below 1.
        """
        if places < 1:
            raise ValueError(f"places is {places}: at least 1 is needed")
        features = np.asarray(features)
        width = self._searcher.features.shape[1]
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"features must be (Q, {width}), as the network gives them, got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features holds NaN or Inf: leave the images out that could not be decoded.")
        return self._searcher.search(features, places, exact)

    @property
    def size(self) -> int:
        """How many images are searched in."""
        return self._searcher.alive


def update_index(
    folder: str | Path | IndexFolder,
    extractor: FeatureExtractor,
    gallery: Sequence[Sample],
    kind: IndexKind = "flat",
    progress: Show = lambda done, total: None,
) -> Update:
    """Make the index of a gallery, or bring one up to date: only images that are new in it or changed are embedded.

    An image is identified by its path, size and time of modification. Images that the gallery no longer holds keep
    their features but are not found; they are not embedded again when they come back. Features are written as they are
    made: a call that was stopped continues there, and until everything is done the index is as it was before, or not
    there.

    The folder holds `features.f32`, (n,C) float32; `index.json`, with the images, the hash of the weights and the
    parameters; and, for each approximate kind that was asked for, faiss's own file.

    Args:
        folder: a new one, or one that this has written.
        extractor: with `broken_images` "skip" images that cannot be decoded are left out; a later call tries them
            again.
        gallery: the images; of several that are the same file, by whatever path or symbolic link, the first counts.
        kind: of the index; "flat" needs no more than the features.
        progress: called with (images embedded, images to embed).

    Raises:
        TypeError: the gallery holds something else than samples.
        ValueError: there is no such kind.
        DanFastError: faiss is not installed, for another kind than flat; an index of another checkpoint, an image that
            cannot be decoded, no image at all, too few for the kind, or a folder that cannot be written or that another
            process is writing to.

    Example: see `GalleryIndex`.
    """
    if kind not in get_args(IndexKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(IndexKind))}, got {kind!r}")
    if kind != "flat":
        kinds.faiss_library()
    gallery = list(gallery)
    for sample in gallery:
        if not isinstance(sample, Sample):
            raise TypeError(
                f"gallery must hold dan_fast.data.Sample, got {type(sample).__name__}: of a path whose person and "
                "camera are unknown make Sample(path, -1, -1)"
            )
    by_place: dict[str, Sample] = {}
    for place, sample in zip(real_paths(gallery), gallery, strict=True):
        by_place.setdefault(place, sample)
    images = {absolute(sample.path): sample for sample in by_place.values()}
    if not images:
        raise DanFastError("The gallery is empty: name images to search in.")
    known = folder if isinstance(folder, IndexFolder) else IndexFolder(folder, extractor)
    folder = known.folder
    try:
        with alone(folder / ".lock"):
            try:
                remove_unfinished(folder)
                known.read_latest()
                update = _add_images(known, extractor, images, kind, progress)
                if not known.stored["gallery"]:
                    raise DanFastError("No image of the gallery can be decoded: name another folder.")
                if kind != "flat":
                    _bring_up_to_date(known, kind)
                known.write()
            finally:
                # One without any feature is of no use.
                with suppress(OSError):
                    if not (folder / FEATURES).stat().st_size:
                        (folder / FEATURES).unlink()
    finally:
        with suppress(OSError):
            folder.rmdir()
    return update


def _add_images(
    known: IndexFolder, extractor: FeatureExtractor, images: dict[str, Sample], kind: IndexKind, progress: Show
) -> Update:
    """Embed what is new among the images, and write down which rows are the gallery."""
    stored = known.stored
    before = set(stored["paths"])
    statuses = {path: status_of(path) for path in images}
    rows = rows_of(stored)
    new = [path for path in images if (path, *statuses[path]) not in rows]
    files = [(images[path].path, path, statuses[path]) for path in new]
    skipped = _embed(known, extractor, files, progress)
    rows, stored["gallery"] = rows_of(stored), []
    for path, sample in images.items():
        row = rows.get((path, *statuses[path]))
        if row is not None:
            stored["gallery"].append(row)
            # NumPy's integers are no JSON.
            stored["pids"][row], stored["camids"][row] = int(sample.pid), int(sample.camid)
    return Update(
        added=len(new) - len(skipped),
        kept=len(images) - len(new),
        changed=[Path(path) for path in new if path in before],
        gone=[Path(path) for path in sorted(before - images.keys())],
        skipped=skipped,
        behind=[each for each, of in stored["kinds"].items() if each != kind and of["rows"] < len(stored["paths"])],
        decoded_by=stored["decoded_by"],
    )


def _embed(
    known: IndexFolder, extractor: FeatureExtractor, new: Sequence[tuple[Path, str, tuple[int, int]]], progress: Show
) -> list[Path]:
    """Append the features of files, and absolute path and status of each; returns those that cannot be decoded."""
    skipped: list[Path] = []
    added: list[tuple[str, tuple[int, int]]] = []
    stored, file = known.stored, known.folder / FEATURES
    before, saved = len(stored["paths"]), 0

    def whole() -> dict[str, Any]:
        unknown = [-1] * len(added)
        columns = ([path for path, _ in added], [status for _, status in added], unknown, unknown)
        extended = {name: stored[name] + column for name, column in zip(COLUMNS, columns, strict=True)}
        # An index may be older than this entry.
        decoded_by = {*stored.get("decoded_by", ()), *([DECODED_BY] if added else ())}
        return stored | extended | {"decoded_by": sorted(decoded_by)}

    try:
        if not before:
            # No index has these rows. In a file of its own the new ones leave those alone who have the old one mapped.
            file.unlink(missing_ok=True)
        file.touch()
        # Its end is inside, where what could not be written is tried once more.
        with file.open("r+b") as stream:
            # What a killed process wrote and did not write down.
            stream.truncate(4 * known.size * before)
            stream.seek(0, os.SEEK_END)

            def save() -> None:
                stream.flush()
                os.fsync(stream.fileno())
                known.write_unfinished(whole())

            try:
                done = 0
                for rows in extractor.batches([given for given, *_ in new]):
                    share, readable = new[done : done + len(rows)], rows[:, 0].isfinite()
                    stream.write(rows[readable].numpy().data)
                    found = list(zip(share, readable.tolist(), strict=True))
                    skipped += [given for (given, *_), is_readable in found if not is_readable]
                    # All of a batch in one step: an interrupt comes before it or after it.
                    added += [(path, status) for (_, path, status), is_readable in found if is_readable]
                    done += len(rows)
                    progress(done, len(new))
                    if len(added) - saved >= max(_SAVED, (before - known.finished + saved) // 10):
                        saved = len(added)
                        save()
            finally:
                if len(added) > saved:
                    save()
    except OSError as error:
        raise DanFastError(f"{file} could not be written ({error.strerror}): make room.") from error
    stored.update(whole())
    return skipped


def _bring_up_to_date(known: IndexFolder, kind: str) -> None:
    """Add to an approximate index the rows that it lacks, or make it."""
    folder, made, rows = known.folder, known.stored["kinds"], len(known.stored["paths"])
    features, found = known.features(rows), made.get(kind)
    if found is None or not (folder / found["file"]).is_file() or kinds.is_outgrown(kind, found["parameters"], rows):
        index, parameters = kinds.build(kind, features)
    elif found["rows"] < rows:
        index, parameters = kinds.read(folder / found["file"], found["rows"], known.size), found["parameters"]
        kinds.extend(index, features)
    else:
        return
    # A new name: until index.json names it, what was there before is used.
    name = f"{kind}-{rows}.faiss"
    kinds.write(index, folder / name)
    made[kind] = {"file": name, "rows": rows, "parameters": parameters}
