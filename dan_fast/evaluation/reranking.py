"""k-reciprocal re-ranking in bounded memory (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal
Encoding", CVPR 2017).

An image is encoded by its reciprocal neighbours: its nearest images that have it among their own nearest ones. The
final distance mixes the Jaccard distance of two such encodings with the original one. The authors' code keeps several
matrices of all images by all images; here the nearest neighbours of each image are kept, and the encodings as sparse
rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dan_fast.evaluation.counting import ranks_by_distances
from dan_fast.evaluation.distances import Metric, distance_scale, distances_of_dots, on_grid, square_norms, tree_dots
from dan_fast.evaluation.pairs import Labels, Pairs
from dan_fast.evaluation.ranking import (
    BLOCK_BYTES,
    ArrayLike,
    AveragePrecision,
    RankingResult,
    check_features,
    check_labels,
    check_metric,
    check_settings,
    score,
)

# Its name in protocols.
RERANKED = "k-reciprocal re-ranking"
# Rows of sparse products at a time: their results are many times as large as what is kept of them.
_SPARSE_ROWS = 2048
# Bytes of temporaries for each distance of a block, and for each number of the pairs that are compared at once.
_ENTRY_BYTES, _NUMBER_BYTES = 64, 32


class Reranking(NamedTuple):
    """Settings of k-reciprocal re-ranking; the defaults are the paper's.

    Attributes:
        k1: nearest neighbours among which reciprocal ones are looked for.
        k2: nearest neighbours over which encodings are averaged.
        weight: lambda, the share of the original distance.
    """

    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    def __str__(self) -> str:
        return f"{RERANKED} (k1 {self.k1}, k2 {self.k2}, lambda {self.weight:g})"


PAPER = Reranking()


def evaluate_reranked(
    query_features: ArrayLike,
    gallery_features: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cams: ArrayLike,
    gallery_cams: ArrayLike,
    metric: Metric = "cosine",
    max_rank: int = 50,
    ap: AveragePrecision = "standard",
    block_bytes: int = BLOCK_BYTES,
    reranking: Reranking = PAPER,
) -> RankingResult:
    """As :func:`dan_fast.evaluation.evaluate_ranking`, by the distances of :func:`reranked_distances`.

    Raises:
        ValueError: an argument of wrong shape, length or content; `NoMatchError` if no query matches.

    Example:
        >>> import torch
        >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.0, 1.0]])
        >>> evaluate_reranked(query, gallery, [7], [7, 8], [1], [2, 2]).mAP
        1.0
    """
    query, gallery = check_features(query_features, gallery_features)
    labels = check_labels(query_ids, gallery_ids, query_cams, gallery_cams, len(query), len(gallery))
    check_settings(max_rank, ap, block_bytes)

    def broken() -> ValueError:
        return ValueError("the re-ranked distances hold NaN; the features may be too large.")

    def ranked() -> Iterator[tuple[Pairs, np.ndarray]]:
        for rows, distances in reranked_distances(query, gallery, metric, reranking, block_bytes):
            part = Labels(labels.query_ids[rows], labels.gallery_ids, labels.query_cams[rows], labels.gallery_cams)
            yield from ranks_by_distances(torch.from_numpy(distances), part, block_bytes, broken)

    return score(ranked(), max_rank, ap)


def reranked_distances(
    query_features: ArrayLike,
    gallery_features: ArrayLike,
    metric: Metric = "cosine",
    reranking: Reranking = PAPER,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Distances after re-ranking, for some queries at a time.

    Args:
        query_features, gallery_features: (Q, d) and (G, d) finite features; products are formed where they are.
        metric: the original distance: 1 - cos, or the squared Euclidean one, each divided by an image's largest.
        reranking: k1, k2 and lambda.
        block_bytes: memory of a block of distances; the neighbours and encodings come on top, some hundred to
            thousand bytes an image.

    Yields:
        (rows, distances): which queries, and (rows, G) float64.

    Raises:
        ValueError: features that do not fit, or a setting out of its range.

    Example:
        >>> import torch
        >>> features = torch.eye(3)
        >>> [(rows, distances)] = reranked_distances(features, features)
        >>> distances.shape, bool(distances[0, 0] < distances[0, 1])
        ((3, 3), True)
    """
    check_metric(metric)
    k1, k2, weight = reranking
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}; it must lie between 0 and 1.")
    original = _Distances(*check_features(query_features, gallery_features), metric, block_bytes)
    neighbours, largest = _neighbours(original, max(k1 + 1, k2))
    encodings = _encodings(original, neighbours, largest, k1)
    if k2 > 1:
        nearest = neighbours[:, :k2]
        means = np.full(nearest.size, 1 / nearest.shape[1], dtype=np.float32)
        begin = np.arange(len(nearest) + 1) * nearest.shape[1]
        encodings = sparse.csr_array((means, nearest.ravel(), begin), shape=encodings.shape) @ encodings
    queries = len(original.parts[0])
    of_queries, of_gallery = encodings[:queries], encodings[queries:].tocsc()
    del encodings, neighbours
    for rows in original.blocks(queries):
        distances = original.of_rows(rows)[:, queries:].cpu().numpy() / largest[rows, None]
        distances *= weight
        for row, query in enumerate(range(rows.start, rows.stop)):
            distances[row] += (1 - weight) * _jaccard(of_queries, query, of_gallery)
        yield rows, distances


class _Distances:
    """Distances among all images, the queries first, a block of rows at a time."""

    def __init__(self, query: Tensor, gallery: Tensor, metric: Metric, budget: int) -> None:
        self.parts, self.budget = (query, gallery), budget
        squares = np.concatenate([square_norms(part, budget) for part in self.parts])
        self.scale = distance_scale(squares, squares, metric)
        self.norms, self.steps = (
            torch.from_numpy(x).to(query.device) for x in (self.scale.query_norms, self.scale.steps)
        )

    def __len__(self) -> int:
        return len(self.norms)

    def blocks(self, count: int) -> Iterator[slice]:
        rows = max(1, self.budget // (_ENTRY_BYTES * len(self)))
        for start in range(0, count, rows):
            yield slice(start, min(start + rows, count))

    def images(self, places: Tensor) -> Tensor:
        """(n, d) features of the images at the given places, in float64."""
        queries = len(self.parts[0])
        found = self.norms.new_empty(len(places), self.parts[0].shape[1])
        of_query = places < queries
        found[of_query] = self.parts[0][places[of_query]].to(torch.float64)
        found[~of_query] = self.parts[1][places[~of_query] - queries].to(torch.float64)
        return found

    def of_rows(self, rows: slice) -> Tensor:
        """(rows, N) distances."""
        distances = self.norms.new_empty(rows.stop - rows.start, len(self))
        left = self.images(torch.arange(rows.start, rows.stop, device=distances.device))
        columns, first = max(1, self.budget // (_NUMBER_BYTES * left.shape[1])), 0
        for part in self.parts:
            for chunk in part.split(columns):
                last = slice(first, first + len(chunk))
                dots = left @ chunk.to(torch.float64).T
                norms = self.norms[rows, None], self.norms[last]
                distances[:, last] = on_grid(distances_of_dots(dots, *norms, self.scale.cosine), self.steps[rows, None])
                first = last.stop
        return distances

    def of_pairs(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(n,) distances of pairs of places."""
        found = np.empty(len(left))
        size = max(1, self.budget // (2 * _NUMBER_BYTES * self.parts[0].shape[1]))
        for first in range(0, len(left), size):
            last = slice(first, first + size)
            i, j = (torch.from_numpy(x[last].astype(np.int64)).to(self.norms.device) for x in (left, right))
            dots = tree_dots(self.images(i), self.images(j))
            distances = on_grid(distances_of_dots(dots, self.norms[i], self.norms[j], self.scale.cosine), self.steps[i])
            found[last] = distances.cpu().numpy()
        return found


def _neighbours(original: _Distances, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, count) int32 nearest images of each, nearest first, equal ones by place; and (N,) the largest distance."""
    count = min(count, len(original))
    neighbours, largest = np.empty((len(original), count), dtype=np.int32), np.empty(len(original))
    for rows in original.blocks(len(original)):
        block = original.of_rows(rows)
        largest[rows] = block.amax(1).cpu().numpy()
        last = block.topk(count, dim=1, largest=False).values[:, -1:]
        # All images as near as the last one are candidates, so that place decides among them.
        row, place = (block <= last).nonzero(as_tuple=True)
        order = torch.argsort(block[row, place], stable=True)
        order = order[torch.argsort(row[order], stable=True)]
        begin = torch.searchsorted(row, torch.arange(len(block), device=row.device))
        taken = order[(begin[:, None] + torch.arange(count, device=row.device)).reshape(-1)]
        neighbours[rows] = place[taken].view(-1, count).cpu().numpy()
    return neighbours, np.maximum(largest, 1e-300)


def _reciprocal(neighbours: np.ndarray) -> sparse.csr_array:
    """(N, N) with 1 where two images are neighbours of each other."""
    images, count = neighbours.shape
    mutual = np.empty(neighbours.shape, dtype=bool)
    for first in range(0, images, _SPARSE_ROWS):
        block = neighbours[first : first + _SPARSE_ROWS]
        own = np.arange(first, first + len(block))[:, None, None]
        mutual[first : first + len(block)] = (neighbours[block] == own).any(2)
    begin = np.concatenate([[0], np.cumsum(mutual.sum(1))])
    return sparse.csr_array((np.ones(begin[-1], np.float32), neighbours[mutual], begin), shape=(images, images))


def _encodings(original: _Distances, neighbours: np.ndarray, largest: np.ndarray, k1: int) -> sparse.csr_array:
    """(N, N) rows of weights exp(-distance) over an image's expanded reciprocal neighbours, each with sum 1."""
    reciprocal = _reciprocal(neighbours[:, : k1 + 1])
    # As NumPy rounds in the authors' code: a half goes to the even neighbour.
    half = _reciprocal(neighbours[:, : int(np.around(k1 / 2)) + 1])
    sizes, turned = half.sum(1), half.T.tocsr()
    encoded = []
    for first in range(0, len(original), _SPARSE_ROWS):
        own = reciprocal[first : first + _SPARSE_ROWS]
        common = own.multiply(own @ turned).tocoo()
        # A neighbour's own half-size set joins if more than two thirds of it are in the image's set.
        joins = 3 * common.data > 2 * sizes[common.col]
        joining = sparse.csr_array((common.data[joins], (common.row[joins], common.col[joins])), shape=own.shape)
        expanded = (own + joining @ half).tocsr()
        expanded.sort_indices()
        rows = np.repeat(np.arange(own.shape[0]), np.diff(expanded.indptr))
        weights = np.exp(-original.of_pairs(rows + first, expanded.indices) / largest[rows + first])
        sums = np.bincount(rows, weights, minlength=own.shape[0])
        expanded.data = (weights / sums[rows]).astype(np.float32)
        encoded.append(expanded)
    return sparse.vstack(encoded, format="csr")


def _jaccard(of_queries: sparse.csr_array, query: int, of_gallery: sparse.csc_array) -> np.ndarray:
    """(G,) Jaccard distances of a query's encoding and all of the gallery."""
    own = slice(of_queries.indptr[query], of_queries.indptr[query + 1])
    columns, weights = of_queries.indices[own], of_queries.data[own]
    begin = of_gallery.indptr[columns]
    sizes = of_gallery.indptr[columns + 1] - begin
    ends = np.cumsum(sizes)
    entries = np.repeat(begin - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)
    smaller = np.minimum(of_gallery.data[entries], np.repeat(weights, sizes))
    common = np.bincount(of_gallery.indices[entries], smaller, minlength=of_gallery.shape[0])
    return 1 - common / (2 - common)
