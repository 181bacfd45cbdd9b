"""The approximate indexes, as faiss makes, extends, writes and searches them.

HNSW is the graph of Malkov and Yashunin ("Efficient and Robust Approximate Nearest Neighbor Search Using Hierarchical
Navigable Small World Graphs", TPAMI 2020), here of numbers from -1 to 1 rounded to eight bits. IVF-PQ looks into the
cells of a coarse quantizer that are nearest and compares codes of a byte for eight numbers (Jegou et al., "Product
Quantization for Nearest Neighbor Search", TPAMI 2011).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_whole
from dan_fast.core.optional import optional

IndexKind: TypeAlias = Literal["flat", "hnsw", "ivfpq"]

# Rows that are read at a time: with 2048 numbers each, 512 MB.
CHUNK = 65536
# Neighbours of a node in the graph, and how many candidates are kept while it is built and searched.
_M, _EF_CONSTRUCTION, _EF_SEARCH = 32, 120, 256
# The eight bits of a number in the graph are of those from minus this to this.
_RANGE = 1
# Numbers that a byte of a code stands for, cells that are looked into, iterations of k-means, rows a cell to train on.
_NUMBERS_A_BYTE, _PROBES, _ITERATIONS, _TRAINED_A_CELL = 8, 32, 10, 64
# A code of a byte has so many values, which take as many rows to train.
_LEAST = 256


def faiss_library() -> ModuleType:
    """The module faiss; DanFastError where it is not installed."""
    return optional(
        "faiss",
        "An approximate index needs faiss, which is not installed: pip install 'dan-fast[search]', or use flat.",
    )


def build(kind: str, features: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """An index of (n,C) features, which are read in chunks, and its parameters; DanFastError where n is too few."""
    count, size = features.shape
    index, parameters = _new_hnsw(size) if kind == "hnsw" else _new_ivfpq(count, size)
    if not index.is_trained:
        chosen = np.linspace(0, count - 1, min(count, parameters["trained_on"])).astype(np.int64)
        index.train(features[chosen])
    extend(index, features)
    return index, parameters


def extend(index: Any, features: np.ndarray) -> None:
    """Add the rows of (n,C) features that an index lacks."""
    for first in range(index.ntotal, len(features), CHUNK):
        index.add(np.ascontiguousarray(features[first : first + CHUNK]))


def is_outgrown(kind: str, parameters: dict[str, Any], rows: int) -> bool:
    """Whether an index was trained on images that do not stand for `rows`, so that it has to be made anew."""
    # A graph without a range has those of its first gallery, which clip what came later for good.
    return "range" not in parameters if kind == "hnsw" else rows > 4 * parameters["rows_when_trained"]


def write(index: Any, path: Path) -> None:
    """Write an index by faiss; the file appears whole or not at all."""
    faiss = faiss_library()
    write_whole(path, lambda stream: faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write)))


def read(path: Path, rows: int, size: int) -> Any:
    """What `write` wrote of an index of so many features; DanFastError: it is missing, damaged or of others."""
    try:
        index = faiss_library().read_index(str(path))
        if (index.ntotal, index.d) != (rows, size):
            raise RuntimeError(f"{index.ntotal} features of {index.d} numbers, not {rows} of {size}")
    except RuntimeError as error:
        raise DanFastError(
            f"{path} is missing or damaged: remove it and search with this gallery again, which makes it anew."
        ) from error
    return index


def fetched(kind: str, places: int) -> int:
    """How many rows `search` should be asked for, where the nearest `places` by exact distance are wanted."""
    if kind == "hnsw":
        # Of a network that tells little apart, all cosines above 0.999, eight bits order the first ones otherwise.
        return places + 24
    # Codes only guess the order of near images: many are fetched for the exact distances to decide.
    return 20 * places + 50


def search(kind: str, index: Any, queries: np.ndarray, places: int) -> np.ndarray:
    """(Q, places) int64 rows near (Q,C) queries; -1 where there are no more."""
    faiss = faiss_library()
    if kind == "hnsw":
        wanted = faiss.SearchParametersHNSW(efSearch=max(_EF_SEARCH, 2 * places))
    else:
        wanted = faiss.SearchParametersIVF(nprobe=min(_PROBES, index.nlist))
    return index.search(queries, places, params=wanted)[1]


def _new_hnsw(size: int) -> tuple[Any, dict[str, Any]]:
    """An index for features of so many numbers, and its parameters, which stand in index.json."""
    faiss = faiss_library()
    # Of features of length 1 the same are near by either metric; faiss forms squared differences faster. Numbers of
    # eight bits are a quarter of the memory traffic, which the time of a search is; exact distances follow.
    index = faiss.IndexHNSWSQ(size, faiss.ScalarQuantizer.QT_8bit, _M, faiss.METRIC_L2)
    index.hnsw.efConstruction = _EF_CONSTRUCTION
    # Ranges that hold every feature of length 1: learnt from a gallery they would clip those that are added later.
    index.train(np.array([[-_RANGE], [_RANGE]], dtype=np.float32).repeat(size, axis=1))
    parameters = {"M": _M, "efConstruction": _EF_CONSTRUCTION, "efSearch": _EF_SEARCH, "bits": 8, "range": _RANGE}
    return index, parameters


def _new_ivfpq(rows: int, size: int) -> tuple[Any, dict[str, Any]]:
    faiss = faiss_library()
    if rows < _LEAST:
        raise DanFastError(f"An ivfpq index is made of {_LEAST} images at least, not of {rows}: use flat.")
    cells = max(1, min(2 * int(rows**0.5), rows // _TRAINED_A_CELL))
    code = max(bytes_ for bytes_ in range(1, max(1, size // _NUMBERS_A_BYTE) + 1) if size % bytes_ == 0)
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(size), size, cells, code, 8, faiss.METRIC_INNER_PRODUCT)
    # Few rows a centroid are no mistake where there are few rows; faiss would print a warning.
    for clustering in (index.cp, index.pq.cp):
        clustering.niter, clustering.min_points_per_centroid = _ITERATIONS, 1
    trained_on = min(rows, max(_LEAST * _TRAINED_A_CELL, cells * _TRAINED_A_CELL))
    parameters = {"cells": cells, "code_bytes": code, "probes": _PROBES, "trained_on": trained_on}
    return index, parameters | {"rows_when_trained": rows}
