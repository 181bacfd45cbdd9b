"""The ranked lists of queries, as they stand in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dan_fast.core.files import absolute
from dan_fast.data.overlap import numbering_of
from dan_fast.data.samples import Sample, real_paths
from dan_fast.inference.sources import Part, samples_of
from dan_fast.search.gallery_index import GalleryIndex
from dan_fast.search.searcher import Found, recall

# Queries that the exact search is asked too, to tell what an approximate one misses.
_COMPARED = 200


def ranked_lists(
    index: GalleryIndex, queries: Sequence[Part], gallery: Sequence[Part], features: np.ndarray, top: int
) -> list[dict[str, Any]]:
    """For each query its path, pid and camid, and under "matches" the images nearest to it, nearest first.

    A match has a rank, a path, a score (the cosine), a pid, a camid, and `same_person`, whether it shows the query's
    one; what is not known is None. The file that is the query itself, by whatever path or link, is left out; images of
    the same person by the same camera, which figures of merit leave out, are not. A query whose features are NaN has
    None for its matches.

    Args:
        index: of the gallery.
        queries: the images that are searched for.
        gallery: the images that the index was last updated with.
        features: (Q,C) of the queries.
        top: images in a list.
    """
    readable = np.flatnonzero(np.isfinite(features).all(axis=1))
    samples = samples_of(queries)
    lists = [_described(query) | {"matches": None} for query in samples]
    persons = _Persons(queries, gallery)
    found = _others(index, [samples[place] for place in readable], features[readable], top)
    for place, scores, rows in zip(readable.tolist(), found.scores, found.rows, strict=True):
        images = [(index.images[row], score) for row, score in zip(rows, scores.tolist(), strict=True) if row >= 0]
        matches = [_described(image) | {"score": score} for image, score in images]
        lists[place]["matches"] = [
            {"rank": rank} | match | {"same_person": persons.same(place, lists[place]["pid"], match)}
            for rank, match in enumerate(matches, start=1)
        ]
    return lists


class _Persons:
    """Which pids can be compared: they name persons within a numbering only, and not all of them do."""

    def __init__(self, queries: Sequence[Part], gallery: Sequence[Part]) -> None:
        self._of_queries = [numbering for numbering, _ in _numbered(queries)]
        self._of_gallery: dict[str, str | None] = {}
        # Of several with one path the first counts, as in the index.
        for numbering, sample in _numbered(gallery):
            self._of_gallery.setdefault(absolute(sample.path), numbering)
        datasets = [part.dataset for part in (*queries, *gallery) if part.dataset is not None]
        # Elsewhere it is the pid of distractors, who are many persons or none.
        self._with_person_0 = {
            numbering_of(dataset) for dataset in datasets if any(sample.pid == 0 for sample in dataset.query)
        }

    def same(self, query: int, pid: int | None, match: dict[str, Any]) -> bool | None:
        """Whether a match shows the person of the query at a place; None where that is not known."""
        numbering = self._of_queries[query]
        if None in (numbering, pid, match["pid"]) or self._of_gallery.get(match["path"]) != numbering:
            return None
        if pid == match["pid"] == 0 and numbering not in self._with_person_0:
            return None
        return pid == match["pid"]


def _numbered(parts: Sequence[Part]) -> Iterator[tuple[str | None, Sample]]:
    """Each image after the numbering of its pid, None where it is of no dataset."""
    for part in parts:
        numbering = None if part.dataset is None else numbering_of(part.dataset)
        yield from ((numbering, sample) for sample in part.samples)


def measured_recall(
    index: GalleryIndex, queries: Sequence[Part], features: np.ndarray, top: int
) -> dict[str, Any] | None:
    """Of the lists that the exact search would give, the share that this index finds, over some of the queries.

    None where these lists are empty.
    """
    readable = np.flatnonzero(np.isfinite(features).all(axis=1))
    some = readable[np.linspace(0, len(readable) - 1, min(_COMPARED, len(readable))).astype(int)]
    samples = samples_of(queries)
    own = [samples[place] for place in some]
    found, exact = (_others(index, own, features[some], top, exact).rows for exact in (False, True))
    return {"at": top, "value": recall(found, exact), "queries": len(some)} if (exact >= 0).any() else None


def _others(index: GalleryIndex, own: Sequence[Sample], features: np.ndarray, top: int, exact: bool = False) -> Found:
    """The `top` nearest images to queries, of which each has a file of its own that is left out."""
    places = min(top, index.size)
    scores, rows = index.search(features, places + 1, exact)
    listed = np.unique(rows[rows >= 0]).tolist()
    files = dict(zip(listed, real_paths(index.images[row] for row in listed), strict=True))
    is_own = [
        [files.get(row) == file for row in of_query]
        for file, of_query in zip(real_paths(own), rows.tolist(), strict=True)
    ]
    # A file is in an index once: it goes last, and the last is one too many.
    kept = np.argsort(np.array(is_own, dtype=bool).reshape(rows.shape), axis=1, kind="stable")[:, :places]
    return Found(*(np.take_along_axis(values, kept, axis=1) for values in (scores, rows)))


def _described(sample: Sample) -> dict[str, Any]:
    known = {"pid": sample.pid, "camid": sample.camid}
    return {"path": absolute(sample.path)} | {name: None if value < 0 else value for name, value in known.items()}
