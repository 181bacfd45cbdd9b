"""Distances that galleries are ranked by, with the same bits on every path and device.

The distance of a pair is 1 - cos or the squared Euclidean distance, formed in float64. The dot product is a tree: the d
products, padded with zeros to a power of two, are halved by adding the second half to the first until one number is
left. That takes elementwise operations only, so equal features have equal distances wherever they stand, which a matrix
product does not guarantee. Distances are rounded to a grid of 2^-40 of the largest possible one, so that distances that
differ by rounding errors only are ties.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Metric: TypeAlias = Literal["cosine", "euclidean"]

SMALLEST_NORM = 1e-12
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


def distance_scale(query_squares: np.ndarray, gallery_squares: np.ndarray, metric: Metric) -> DistanceScale:
    """Norms and grid from the (Q,) and (G,) squared norms of the features."""
    largest = float(gallery_squares.max())
    exponent = int(np.frexp(np.sqrt(max(largest, float(query_squares.max()))))[1])
    if metric == "cosine":
        query, gallery = (np.maximum(np.sqrt(x), SMALLEST_NORM) for x in (query_squares, gallery_squares))
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
