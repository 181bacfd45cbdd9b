"""The ranked lists of queries, as they stand in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dan_fast.core.files import absolute
from dan_fast.data.samples import Sample
from dan_fast.search.gallery_index import GalleryIndex
from dan_fast.search.searcher import recall

# Queries that the exact search is asked too, to tell what an approximate one misses.
_COMPARED = 200


def ranked_lists(
    index: GalleryIndex, queries: Sequence[Sample], features: np.ndarray, top: int
) -> list[dict[str, Any]]:
    """For each query its path, pid and camid, and under "matches" the images nearest to it, nearest first.

    A match has a rank, a path, a score (the cosine), a pid and a camid; what is not known is None. The file that is the
    query itself, by its path, is left out; images of the same person by the same camera, which figures of merit leave
    out, are not. A query whose features are NaN has None for its matches.
    """
    readable = np.flatnonzero(np.isfinite(features).all(axis=1))
    lists = [_described(query) | {"matches": None} for query in queries]
    found = index.search(features[readable], top + 1)
    for place, scores, rows in zip(readable.tolist(), found.scores, found.rows, strict=True):
        own = lists[place]["path"]
        images = [(index.images[row], score) for row, score in zip(rows, scores.tolist(), strict=True) if row >= 0]
        matches = [_described(image) | {"score": score} for image, score in images]
        matches = [match for match in matches if match["path"] != own][:top]
        lists[place]["matches"] = [{"rank": rank} | match for rank, match in enumerate(matches, start=1)]
    return lists


def measured_recall(index: GalleryIndex, features: np.ndarray, top: int) -> dict[str, Any]:
    """Of the `top` images that the exact search finds, the share that this index finds, over some of the queries."""
    readable = features[np.isfinite(features).all(axis=1)]
    some = readable[np.linspace(0, len(readable) - 1, min(_COMPARED, len(readable))).astype(int)]
    found, exact = (index.search(some, top, exact).rows for exact in (False, True))
    return {"at": top, "value": recall(found, exact), "queries": len(some)}


def _described(sample: Sample) -> dict[str, Any]:
    known = {"pid": sample.pid, "camid": sample.camid}
    words = {name: None if value < 0 else value for name, value in known.items()}
    return {"path": absolute(sample.path)} | words
