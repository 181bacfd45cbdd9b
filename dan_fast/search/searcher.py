"""Features, what finds the nearest of them, and how many of the nearest an approximate search finds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dan_fast.search import kinds
from dan_fast.search.exact import nearest_in_float32, order_exactly, search_exactly

# Beyond the places wanted: what float32 may have in another order than float64.
_MARGIN = 8
# Queries at a time: the products of all of them with a chunk of the features would take 256 KB a query.
_BLOCK = 1024


class Found(NamedTuple):
    """The images found for each of Q queries, nearest first.

    Attributes:
        scores: (Q, places) float64 cosines; minus infinity where there are no more images.
        rows: (Q, places) int64, which image; -1 where there are no more.
    """

    scores: np.ndarray
    rows: np.ndarray


class Searcher:
    """Finds features by the largest cosine.

    Args:
        features: (n,C) float32 rows of length 1, which may be mapped from a file.
        order: (n,) int64, the place of each in the gallery, which decides between equal distances; -1 where it is not
            in the gallery and never found.
        kind: what finds candidates; "flat" compares all features.
        index: faiss's, of an approximate kind.

    Attributes:
        alive: how many features are in the gallery.
    """

    def __init__(self, features: np.ndarray, order: np.ndarray, kind: kinds.IndexKind, index: Any = None) -> None:
        self.features, self.order, self.kind, self.index = features, order, kind, index
        self.alive = int((order >= 0).sum())

    def search(self, queries: np.ndarray, places: int, exact: bool = False) -> Found:
        """The nearest features to (Q,C) queries of length 1; `exact` compares all whatever the kind is."""
        distances, rows = np.full((len(queries), places), np.inf), np.full((len(queries), places), -1, dtype=np.int64)
        for first in range(0, len(queries), _BLOCK):
            block = slice(first, first + _BLOCK)
            near, found = self._of_block(np.ascontiguousarray(queries[block], dtype=np.float32), places, exact)
            kept = min(places, near.shape[1])
            distances[block, :kept], rows[block, :kept] = near[:, :kept], found[:, :kept]
        return Found(1 - distances, rows)

    def _of_block(self, queries: np.ndarray, places: int, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        """(Q,k) distances and rows in their order; k is the places or more, or less where there are no more rows."""
        # An index keeps images that are gone: where most are, its candidates would be of them.
        alive, stored = self.alive, len(self.order)
        if exact or self.kind == "flat" or 10 * alive <= stored:
            return search_exactly(self.features, queries, places, self.order)
        wanted = kinds.fetched(self.kind, places)
        # As many more as are gone on average. Where more are gone near a query, what is left of its candidates need not
        # be the nearest of all that are left.
        asked = min(math.ceil(wanted * stored / alive), stored)
        rows = kinds.search(self.kind, self.index, queries, asked)
        rows[self.order[rows] < 0] = -1
        least = min((wanted + places) // 2 if alive < stored else places, alive)
        lacking = np.flatnonzero((rows >= 0).sum(axis=1) < least)
        rows = nearest_in_float32(self.features, queries, rows, places + _MARGIN)
        distances, rows = order_exactly(self.features, queries, rows, self.order)
        if len(lacking):
            exact = search_exactly(self.features, queries[lacking], min(places, alive), self.order)
            for values, others in zip((distances, rows), exact, strict=True):
                values[lacking, : others.shape[1]] = others
        return distances, rows


def recall(found: np.ndarray, nearest: np.ndarray) -> float:
    """The share of the (Q,k) nearest rows that are among the (Q,k) rows found, in any order; -1 is no row.

    Example:
        >>> recall(np.array([[3, 1], [2, 4]]), np.array([[1, 3], [2, 5]]))
        0.75
    """
    hits = ((found[:, :, None] == nearest[:, None, :]) & (nearest >= 0)[:, None, :]).any(axis=1)
    return float(hits.sum() / (nearest >= 0).sum())
