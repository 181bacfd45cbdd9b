"""What stands in the folder of an index, and whether it can be relied on."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_text
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


def require_same_weights(folder: Path, extractor: FeatureExtractor) -> None:
    """Refuse an extractor of another checkpoint than that of the index in a folder, where there is one.

    Raises:
        DanFastError: it is of another one, or damaged.
    """
    read_latest(folder, extractor)


def read_finished(folder: Path, own: str, kind: IndexKind) -> tuple[dict[str, Any], Any]:
    """What index.json says, and faiss's index of an approximate kind."""
    while True:
        stored = _read(folder, INDEX, own)
        if stored is None or (kind != "flat" and stored["kinds"].get(kind, {}).get("rows") != len(stored["paths"])):
            raise DanFastError(f"{folder} holds no finished {kind} index: make it by `dan-fast search --index {kind}`.")
        if kind == "flat":
            return stored, None
        try:
            found = stored["kinds"][kind]
            return stored, kinds.read(folder / found["file"], found["rows"], stored["size"])
        except DanFastError:
            # An update that came to its end in between has removed that file, and index.json names another one.
            if (again := _read(folder, INDEX, own)) is None or again["kinds"].get(kind) == found:
                raise


def read_latest(folder: Path, extractor: FeatureExtractor) -> tuple[dict[str, Any], int]:
    """What is known of the features, and how many rows of it stand in index.json.

    The others are of a call that was stopped.
    """
    own = extractor.weights
    index, unfinished = (_read(folder, name, own) for name in (INDEX, UNFINISHED))
    if index is None:
        index = {name: [] for name in (*COLUMNS, "gallery")}
        index |= {"schema": _SCHEMA, "weights": own, "size": extractor.size, "kinds": {}}
    count = len(index["paths"])
    # Builds that did not count the finished rows wrote all. Without index.json nobody knows of which images they are.
    if unfinished is None or (finished := unfinished.get("finished", 0)) > count:
        return index, count
    joined = {name: index[name][:finished] + unfinished[name] for name in COLUMNS}
    # Left by a call that was killed after it had written index.json.
    if len(joined["paths"]) <= count:
        return index, count
    return index | joined | {"decoded_by": unfinished.get("decoded_by", [])}, count


def _read(folder: Path, name: str, own: str) -> dict[str, Any] | None:
    """The content of a file that `write_index` wrote, of the weights whose hash is `own`; None where there is none."""
    file = folder / name
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
    if weights != own:
        raise DanFastError(
            f"{folder} is an index of another checkpoint (weights {weights[:8]}, not {own[:8]}): use that one, or name "
            "another folder."
        )
    if len(lengths) > 1:
        # Without the other the index is as it was before the call that was stopped.
        wrong = file if name == UNFINISHED else folder
        raise DanFastError(f"{file} has lists of different lengths: remove {wrong}, and what it lacks is made anew.")
    if lacking > 0:
        raise DanFastError(f"{folder / FEATURES} is cut short: remove {folder}, and it is made anew.")
    return content


def mapped(folder: Path, stored: dict[str, Any]) -> np.ndarray:
    """The features (n,C), mapped, and copied where they are written to: PyTorch warns of arrays that cannot be."""
    shape = len(stored["paths"]), stored["size"]
    return np.memmap(folder / FEATURES, dtype=np.float32, mode="c", shape=shape)


def write_index(file: Path, stored: dict[str, Any]) -> None:
    write_text(file, json.dumps(stored, separators=(",", ":")) + "\n")
