"""The gallery images of each query's identity, in blocks of queries that fit a memory budget."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Labels(NamedTuple):
    """(Q,) and (G,) int64 arrays of identities and cameras."""

    query_ids: np.ndarray
    gallery_ids: np.ndarray
    query_cams: np.ndarray
    gallery_cams: np.ndarray


class Pairs(NamedTuple):
    """The gallery images of each query's identity, query by query, for some adjacent queries.

    Attributes:
        rows: which queries.
        offsets: (queries + 1,) int64 where each query's images begin.
        places: (offsets[-1],) int64 places in the gallery, ascending within a query.
        junk: (offsets[-1],) uint8, 1 where the camera is the query's, too: neither match nor wrong.
        match_offsets: (queries + 1,) int64, as offsets, of the images that are not junk.
    """

    rows: slice
    offsets: np.ndarray
    places: np.ndarray
    junk: np.ndarray
    match_offsets: np.ndarray

    @property
    def match_counts(self) -> np.ndarray:
        """(queries,) true matches of each query."""
        return np.diff(self.match_offsets)

    @property
    def queries(self) -> np.ndarray:
        """(offsets[-1],) which query of these each image belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def pairs_in_blocks(labels: Labels, query_bytes: int, pair_bytes: int, budget: int) -> Iterator[Pairs]:
    """All queries in their order, as many at a time as the budget allows and at least one.

    Args:
        labels: identities and cameras.
        query_bytes: memory that a query takes.
        pair_bytes: memory that a gallery image of its identity adds.
        budget: bytes that a block may take.
    """
    order = np.argsort(labels.gallery_ids, kind="stable")
    ordered_ids = labels.gallery_ids[order]
    begin = np.searchsorted(ordered_ids, labels.query_ids, side="left")
    sizes = np.searchsorted(ordered_ids, labels.query_ids, side="right") - begin
    cost = np.cumsum(query_bytes + pair_bytes * sizes)
    start = 0
    while start < len(sizes):
        spent = cost[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(cost, spent + budget, side="right")))
        yield _pairs(labels, order, begin[start:stop], sizes[start:stop], slice(start, stop))
        start = stop


def _pairs(labels: Labels, order: np.ndarray, begin: np.ndarray, sizes: np.ndarray, rows: slice) -> Pairs:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    # Within a query the place is where its run begins plus how far the pair is into the query's own.
    places = order[np.repeat(begin - offsets[:-1], sizes) + np.arange(offsets[-1])]
    junk = labels.gallery_cams[places] == np.repeat(labels.query_cams[rows], sizes)
    matches = np.concatenate([[0], np.cumsum(~junk)])[offsets]
    return Pairs(rows, offsets, places, junk.view(np.uint8), matches)
