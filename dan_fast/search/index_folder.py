"""What stands in the folder of an index, and whether it can be relied on."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_text
from dan_fast.core.home import expanded
from dan_fast.data.images.cache_header import status_of
from dan_fast.inference.extractor import FeatureExtractor
from dan_fast.search import kinds
from dan_fast.search.kinds import IndexKind

# To be raised with every change of what is in an index, the pixels that features are of among it.
_SCHEMA = 2
FEATURES, INDEX, UNFINISHED = "features.f32", "index.json", "unfinished.json"
# The lists in these files that have an entry for each row.
COLUMNS = "paths", "status", "pids", "camids"


def rows_of(stored: dict[str, Any]) -> dict[tuple[str, int, int], int]:
    """(path, size, time) -> row."""
    pairs = zip(stored["paths"], stored["status"], strict=True)
    return {(path, *status): row for row, (path, status) in enumerate(pairs)}


class IndexFolder:
    """The files of an index.

    Of a million images index.json takes a second to read: that is done again only where it has changed since.

    Args:
        folder: of the index; it need not be there.
        extractor: whose features the index has, or will have.

    Attributes:
        stored: what is known of the features, by the names of index.json; see `read_latest`.
        finished: how many rows of it stand in index.json; the others are of a call that was stopped.
    """

    def __init__(self, folder: str | Path, extractor: FeatureExtractor) -> None:
        self.folder, self.weights, self.size = expanded(folder), extractor.weights, extractor.size
        self.stored: dict[str, Any] = {}
        self.finished = 0
        self._content: dict[str, Any] | None = None
        self._seen: list[tuple[int, int]] = []

    def read_latest(self) -> None:
        """Set `stored` and `finished`; DanFastError where they are of another checkpoint or version, or damaged."""
        index, unfinished = self._index(), self._read(UNFINISHED)
        if index is None:
            index = {name: [] for name in (*COLUMNS, "gallery")}
            index |= {"schema": _SCHEMA, "weights": self.weights, "size": self.size, "kinds": {}}
        # A copy of what an update changes in place: one that is stopped leaves index.json as it was.
        self.stored = index | {"kinds": dict(index["kinds"])}
        self.finished = len(index["paths"])
        # Builds that did not count the finished rows wrote all. Without index.json nobody knows of which images these
        # are.
        if unfinished is None or (finished := unfinished.get("finished", 0)) > self.finished:
            return
        joined = {name: index[name][:finished] + unfinished[name] for name in COLUMNS}
        # Or left by a call that was killed after it had written index.json.
        if len(joined["paths"]) > self.finished:
            self.stored |= joined | {"decoded_by": unfinished.get("decoded_by", [])}

    def read_finished(self, kind: IndexKind) -> tuple[dict[str, Any], Any]:
        """What index.json says, and faiss's index of an approximate kind; DanFastError where these are not finished."""
        while True:
            stored = self._index()
            if stored is None or (kind != "flat" and stored["kinds"].get(kind, {}).get("rows") != len(stored["paths"])):
                raise DanFastError(
                    f"{self.folder} holds no finished {kind} index: make it by `dan-fast search --index {kind}`."
                )
            if kind == "flat":
                return stored, None
            found = stored["kinds"][kind]
            try:
                return stored, kinds.read(self.folder / found["file"], found["rows"], self.size)
            except DanFastError:
                # An update that came to its end in between has removed that file, and index.json names another one.
                if (again := self._index()) is None or again["kinds"].get(kind) == found:
                    raise

    def features(self, rows: int) -> np.ndarray:
        """The features (n,C), mapped, and copied where they are written to: PyTorch warns of arrays that cannot be."""
        return np.memmap(self.folder / FEATURES, dtype=np.float32, mode="c", shape=(rows, self.size))

    def write(self) -> None:
        """Have index.json say what is stored, and remove what it has no use for."""
        write_index(self.folder / INDEX, self.stored)
        self._content, self._seen = self.stored, self._status()
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        used = {entry["file"] for entry in self.stored["kinds"].values()}
        for file in self.folder.glob("*.faiss"):
            if re.fullmatch(rf"({'|'.join(get_args(IndexKind))})-[0-9]+\.faiss", file.name) and file.name not in used:
                file.unlink(missing_ok=True)

    def write_unfinished(self, stored: dict[str, Any]) -> None:
        """Keep the rows that index.json lacks: to write all again would take longer than to embed what is new."""
        since = {name: stored[name][self.finished :] for name in COLUMNS}
        write_index(self.folder / UNFINISHED, stored | since | {"gallery": [], "finished": self.finished})

    def _index(self) -> dict[str, Any] | None:
        """The content of index.json, None where there is none."""
        status = self._status()
        if status != self._seen:
            self._content, self._seen = self._read(INDEX), status
        return self._content

    def _status(self) -> list[tuple[int, int]]:
        return [status_of(str(self.folder / name)) for name in (INDEX, FEATURES)]

    def _read(self, name: str) -> dict[str, Any] | None:
        """The content of a file that `write_index` wrote; None where there is none."""
        folder, file = self.folder, self.folder / name
        try:
            content = json.loads(file.read_bytes())
            schema, weights, size = int(content["schema"]), str(content["weights"]), content["size"]
            lengths = {len(content[column]) for column in COLUMNS}
            rows = content.get("finished", 0) + len(content["paths"])
            gallery = np.asarray(content["gallery"], dtype=np.int64)
            if ((gallery < 0) | (gallery >= rows)).any():
                raise ValueError("it names rows that are not there")
            for of in content["kinds"].values():
                of["file"], of["rows"], of["parameters"]
            lacking = 4 * size * rows - (folder / FEATURES).stat().st_size
        except FileNotFoundError:
            if file.exists():
                raise DanFastError(f"{folder} lacks {FEATURES}: remove the folder, and it is made anew.") from None
            return None
        except OSError as error:
            where = "name the folder of an index" if folder.is_file() else "check the path and its permissions"
            raise DanFastError(f"{file} cannot be read ({error.strerror}): {where}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DanFastError(f"{file} is no index ({error}): remove {folder}, and it is made anew.") from error
        if schema > _SCHEMA:
            raise DanFastError(f"{file} is of a newer version of dan_fast: use that, or remove {folder}.")
        if schema < _SCHEMA:
            raise DanFastError(f"{file} is of an older version of dan_fast: remove {folder}, and it is made anew.")
        if weights != self.weights:
            raise DanFastError(
                f"{folder} is an index of another checkpoint (weights {weights[:8]}, not {self.weights[:8]}): use that "
                "one, or name another folder."
            )
        if len(lengths) > 1:
            # Without the other the index is as it was before the call that was stopped.
            wrong = file if name == UNFINISHED else folder
            raise DanFastError(
                f"{file} has lists of different lengths: remove {wrong}, and what it lacks is made anew."
            )
        if lacking > 0:
            raise DanFastError(f"{folder / FEATURES} is cut short: remove {folder}, and it is made anew.")
        return content


def write_index(file: Path, stored: dict[str, Any]) -> None:
    write_text(file, json.dumps(stored, separators=(",", ":")) + "\n")
