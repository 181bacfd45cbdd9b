"""Distances that galleries are ranked by, with the same bits on every path and device.

The distance of a pair is 1 - cos or the squared Euclidean distance, formed in float64. The dot product is a tree: the d
products, padded with zeros to a power of two, are halved by adding the second half to the first until one number is
left. That takes elementwise operations only, so equal features have equal distances wherever they stand, which a matrix
product does not guarantee. Distances are rounded to a grid of 2^-40 of the largest possible one, so that distances that
differ by rounding errors only are ties.
"""

from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Metric: TypeAlias = Literal["cosine", "euclidean"]

# Bytes of temporaries for each distance of a query and a gallery image that are compared at once.
ENTRY_BYTES = 64
_SMALLEST_NORM = 1e-12
_GRID_BITS = 40


class DistanceScale(NamedTuple):
    """Norms and grid by which dot products become distances.

    Attributes:
        cosine: whether the distance is 1 - cos.
        query_norms, gallery_norms: (Q,), (G,) float64; norms of at least 1e-12 where cosine, else squared norms.
        steps: (Q,) float64, the grid of each query's distances.
        scale: a power of two that brings the largest norm near 1.
    """

    cosine: bool
    query_norms: np.ndarray
    gallery_norms: np.ndarray
    steps: np.ndarray
    scale: float

    def of(self, queries: slice | np.ndarray, gallery: slice | np.ndarray = slice(None)) -> "DistanceScale":
        """That of some of the queries and some of the gallery."""
        norms = self.query_norms[queries], self.gallery_norms[gallery]
        return DistanceScale(self.cosine, *norms, self.steps[queries], self.scale)


def distance_scale(query_squares: np.ndarray, gallery_squares: np.ndarray, metric: Metric) -> DistanceScale:
    """Norms and grid from the (Q,) and (G,) squared norms of the features."""
    largest = float(gallery_squares.max())
    exponent = int(np.frexp(np.sqrt(max(largest, float(query_squares.max()))))[1])
    if metric == "cosine":
        query, gallery = (np.maximum(np.sqrt(x), _SMALLEST_NORM) for x in (query_squares, gallery_squares))
        return DistanceScale(True, query, gallery, np.full(len(query), np.ldexp(1.0, -_GRID_BITS)), 1.0)
    # A power of two, so that going to the grid and back is exact.
    fraction, power = np.frexp(np.maximum(query_squares + largest, 1e-300))
    steps = np.ldexp(1.0, power - (fraction == 0.5) - _GRID_BITS)
    return DistanceScale(False, query_squares, gallery_squares, steps, float(np.ldexp(1.0, -exponent)))


def tree_dots(left: Tensor, right: Tensor) -> Tensor:
    """(n,) float64 dot products of the rows of two (n, d) matrices; see the module.

    Example:
        >>> tree_dots(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 5.0, 6.0]])).tolist()
        [32.0]
    """
    sums = left.to(torch.float64) * right.to(torch.float64)
    padded = 1 << max(0, sums.shape[1] - 1).bit_length()
    sums = torch.nn.functional.pad(sums, (0, padded - sums.shape[1]))
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


class PartDistances:
    """Distances from queries to a part of the gallery: by products of matrices, up to a known error, and exactly.

    Args:
        query: (Q, d) features.
        part: (n, d) features of adjacent images of the gallery.
        scale: of the queries and the whole gallery.
        budget: bytes of temporaries at a time.
        start: which image of the gallery is the first of `part`.

    Attributes:
        images: of the gallery, which are in the part.
        columns: of how many images of the part `near` should be asked at a time.
        steps: (Q,) float64 grid of each query's distances.
        error: (Q, 1) float64, how far a distance of `near` may be from what `exact` rounds to the grid.
        uncertainty: (Q, 1) float64, how far a distance of `near`, on the grid or not, may be from that of `exact`.
    """

    def __init__(self, query: Tensor, part: Tensor, scale: DistanceScale, budget: int, start: int = 0) -> None:
        self.query, self.part, self.scale, self.budget = query, part, scale, budget
        self.images = slice(start, start + len(part))
        self.columns = max(1, budget // max(32 * query.shape[1], 8 * ENTRY_BYTES))
        query_norms, norms, self.steps = (
            torch.from_numpy(x).to(query.device)
            for x in (scale.query_norms, scale.gallery_norms[self.images], scale.steps)
        )
        self._query_norms, self._norms = query_norms, norms
        unit, width, largest = 2.0**-53, query.shape[1], float(scale.gallery_norms.max())
        if scale.cosine:
            error = torch.full_like(query_norms, 1.02 * (width + 8) * unit + 2.0**-46)
        else:
            error = 2.04 * (width + 8) * unit * (query_norms * largest).sqrt() + 2.0**-46 * (query_norms + largest)
        self.error = error[:, None]
        self.uncertainty = self.error + self.steps[:, None]

    def of_rows(self, rows: slice | np.ndarray) -> "PartDistances":
        """Those of some of the queries, whose features are held in float64."""
        chosen = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(self.query.device)
        features = self.query[chosen].to(torch.float64)
        return PartDistances(features, self.part, self.scale.of(rows), self.budget, self.images.start)

    def near(self, columns: slice) -> Tensor:
        """(Q, columns) distances of images of the part, not on the grid."""
        part, norms = self.part[columns], self._norms[columns]
        distances = norms.new_empty(len(self.query), len(part))
        for first in range(0, len(part), self.columns):
            some = slice(first, first + self.columns)
            dots = self.query @ part[some].to(torch.float64).T
            distances[:, some] = distances_of_dots(dots, self._query_norms[:, None], norms[some], self.scale.cosine)
        return distances

    def exact(self, queries: Tensor, places: Tensor) -> Tensor:
        """(n,) distances on the grid of queries and images of the part, these by their (n,) places in the gallery."""
        found = [self._norms[:0]]
        for some in torch.arange(len(queries), device=queries.device).split(self.columns):
            q, g = queries[some], places[some] - self.images.start
            norms = self._query_norms[q], self._norms[g]
            found.append(exact_distances(self.query[q], self.part[g], *norms, self.steps[q], self.scale.cosine))
        return torch.cat(found)


def exact_distances(
    query: Tensor, gallery: Tensor, query_norms: Tensor, gallery_norms: Tensor, steps: Tensor, cosine: bool
) -> Tensor:
    """(n,) distances on the grid of the rows of two (n, d) matrices; norms and steps (n,) of :class:`DistanceScale`."""
    return on_grid(distances_of_dots(tree_dots(query, gallery), query_norms, gallery_norms, cosine), steps)


def square_norms(features: Tensor, budget: int) -> np.ndarray:
    """(n,) float64 squared norms of the rows, some rows at a time."""
    rows = max(1, budget // (24 * features.shape[1]))
    return np.concatenate([tree_dots(block, block).cpu().numpy() for block in features.split(rows)])


def distances_of_dots(dots: Tensor, query_norms: Tensor, gallery_norms: Tensor, cosine: bool) -> Tensor:
    """Distances, not yet on the grid, from dot products and the norms of :class:`DistanceScale`; shapes broadcast."""
    if cosine:
        return 1 - dots / (query_norms * gallery_norms)
    return query_norms + gallery_norms - 2 * dots


def on_grid(distances: Tensor, steps: Tensor) -> Tensor:
    """Distances rounded to the grid of :class:`DistanceScale`; shapes broadcast."""
    return torch.round(distances / steps) * steps
