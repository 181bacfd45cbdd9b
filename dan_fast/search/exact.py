"""The exact search: all features are compared, and lists have the order in which the evaluation ranks."""

from __future__ import annotations

import numpy as np
import torch

from dan_fast.core.float32 import exact_float32
from dan_fast.evaluation.distances import distance_scale, exact_distances, square_norms
from dan_fast.search.kinds import CHUNK

# Beyond the places wanted: what float32 may have in another order than float64.
_MARGIN = 22
# Pairs whose distances are formed at a time: of more, temporaries leave the cache and it takes five times as long.
_PAIRS = 256
_BUDGET = 64 * 2**20
# Candidates of all queries at a time: where a network tells nothing apart, each image is one for each query.
_CANDIDATES = 2**22


def search_exactly(
    features: np.ndarray, queries: np.ndarray, places: int, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows to each query, in the order of `evaluate_ranking`: by distance, then by place in the gallery.

    Candidates are found in float32, by PyTorch's matrix product, which is several times as fast as faiss's own search
    for a few hundred queries. The distances of these, formed in float64 as the evaluation does, decide; where a row
    that is no candidate could be as near, by the bound of float32's rounding errors, more are fetched.

    Args:
        features: (n,C) float32 rows of length 1, which may be mapped from a file: they are read in chunks.
        queries: (Q,C) float32 rows of length 1.
        places: how many rows to find.
        order: (n,) int64, the place in the gallery; -1 for a row that is not in it.

    Returns:
        (Q, places) float64 distances and int64 rows; infinity and -1 where there are no more.
    """
    alive = int((order >= 0).sum())
    distances, rows = np.full((len(queries), places), np.inf), np.full((len(queries), places), -1, dtype=np.int64)
    error = 1e-6 + features.shape[1] * 2.0**-24
    todo, fetched = np.arange(len(queries)), places + _MARGIN
    while len(todo):
        unsettled, together = [], max(1, _CANDIDATES // min(fetched, alive))
        for asked in (todo[first : first + together] for first in range(0, len(todo), together)):
            products, found = _candidates(features, queries[asked], min(fetched, alive), order)
            exact, ordered = order_exactly(features, queries[asked], found, order)
            kept = min(places, exact.shape[1])
            distances[asked, :kept], rows[asked, :kept] = exact[:, :kept], ordered[:, :kept]
            settled = (fetched >= alive) | (exact[:, kept - 1] < 1 - products.min(axis=1) - error)
            unsettled.append(asked[~settled])
        todo, fetched = np.concatenate(unsettled), 2 * fetched
    return distances, rows


def order_exactly(
    features: np.ndarray, queries: np.ndarray, rows: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates (Q,k), -1 for none, in their exact order; distances and rows as `search_exactly` returns them."""
    query, place = np.nonzero(rows >= 0)
    distances = np.full(rows.shape, np.inf)
    every = torch.from_numpy(queries)
    squares = square_norms(every, _BUDGET)
    for first in range(0, len(query), _PAIRS):
        q, p = query[first : first + _PAIRS], place[first : first + _PAIRS]
        chosen = torch.from_numpy(features[rows[q, p]])
        scale = distance_scale(squares, square_norms(chosen, _BUDGET), "cosine")
        numbers = scale.query_norms[q], scale.gallery_norms, scale.steps[q]
        distances[q, p] = exact_distances(every[q], chosen, *map(torch.from_numpy, numbers), cosine=True).numpy()
    places = np.where(rows >= 0, order[rows], len(order))
    sorting = np.lexsort((places, distances), axis=-1)
    return np.take_along_axis(distances, sorting, 1), np.take_along_axis(rows, sorting, 1)


def nearest_in_float32(features: np.ndarray, queries: np.ndarray, rows: np.ndarray, places: int) -> np.ndarray:
    """Of (Q,k) candidates, -1 for none, the (Q,places) with the largest products in float32, in no order."""
    if rows.shape[1] <= places:
        return rows
    products = np.stack([features[each] @ query for each, query in zip(rows, queries, strict=True)])
    products[rows < 0] = -np.inf
    return np.take_along_axis(rows, np.argpartition(-products, places - 1, axis=1)[:, :places], 1)


def _candidates(
    features: np.ndarray, queries: np.ndarray, places: int, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(Q, places) float32 inner products and rows of the largest ones, in no order."""
    asked = torch.from_numpy(queries)
    products, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for first in range(0, len(features), CHUNK):
        block, present = features[first : first + CHUNK], np.flatnonzero(order[first : first + CHUNK] >= 0)
        if len(present) < len(block):
            block = block[present]
        if not len(present):
            continue
        with exact_float32("cpu"):
            near = asked @ torch.from_numpy(np.asarray(block)).T
        near, found = near.topk(min(places, len(present)), sorted=False)
        products, rows = torch.hstack([products, near]), torch.hstack([rows, first + torch.from_numpy(present)[found]])
        if products.shape[1] > places:
            products, best = products.topk(places, sorted=False)
            rows = rows.gather(1, best)
    return products.numpy(), rows.numpy()
