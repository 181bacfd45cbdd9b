"""Ranking a gallery for each query, and the figures drawn from it: CMC, mAP and mINP.

The rules are those of Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV
2015): a gallery image of the query's identity taken by the query's own camera is junk and is removed from
that query's list; an identity that no query has (0 by convention) is a distractor, wrong for every query; a query
without a match is left out of all figures. Equal distances keep the order of the gallery.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dan_fast.core.defaults import default_cpu
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.evaluation.counting import ranks_by_distances, ranks_by_features
from dan_fast.evaluation.distances import Metric, PartDistances, distance_scale, on_grid
from dan_fast.evaluation.divided import refused_by_all
from dan_fast.evaluation.pairs import Pairs
from dan_fast.evaluation.problem import (
    BLOCK_BYTES,
    ArrayLike,
    AveragePrecision,
    as_tensor,
    check_block_bytes,
    check_labels,
    check_metric,
    check_scoring,
    check_shapes,
    checked_problem,
)


class NoMatchError(ValueError):
    """No query has a match in the gallery, so there is nothing to average."""


class RankingResult(NamedTuple):
    """Figures over the queries that have a match.

    Attributes:
        cmc: (max_rank,) float64 on the CPU; ``cmc[k - 1]`` is the fraction of queries with a match in the
            first k places.
        mAP: mean average precision, a fraction.
        mINP: mean of (matches of a query) / (rank of its last match), a fraction (Ye et al., "Deep Learning
            for Person Re-identification: A Survey and Outlook", TPAMI 2021).
        num_valid: number of queries with at least one match.
    """

    cmc: Tensor
    mAP: float
    mINP: float
    num_valid: int


@default_cpu()
def evaluate_ranking(
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
    process_group: ProcessGroup | None = None,
) -> RankingResult:
    """Rank the gallery by feature distance for every query and score the lists.

    Works in blocks, so the whole query x gallery matrix never exists. Tensors and arrays may be on any device and of
    any floating dtype, and the ranks are those of distances in float64: see :mod:`dan_fast.evaluation.distances`. On
    the CPU the work is divided among `torch.get_num_threads()` threads.

    Args:
        query_features: (Q, d) finite features.
        gallery_features: (G, d) finite features.
        query_ids: (Q,) integer identities.
        gallery_ids: (G,) integer identities.
        query_cams: (Q,) integer cameras.
        gallery_cams: (G,) integer cameras.
        metric: ``"cosine"`` (1 - cos) or ``"euclidean"``, whose distances are compared on a grid of 2^-40 of the
            largest possible one: where the features of one image are 10^6 times as long as the others', the distances
            of the others are ties.
        max_rank: length of the CMC curve; a smaller gallery repeats its last value.
        ap: ``"standard"``, the mean of the precision at each match, or ``"trapezoid"``, the rule of the first
            MATLAB code of Market-1501, which averages the precision at a match with that one place before.
        block_bytes: about how much memory a block of queries may take, beside a few MB per thread and 50 bytes per
            image. Features of two dtypes, or whose columns are not adjacent, are copied.
        process_group: ranks that each hand in all queries and gallery images of their own, of which a rank may have
            none: the gallery is rank 0's images, rank 1's, ... Every rank returns the figures of the whole, to the last
            bit. Identities, cameras and norms are gathered, features are not. PyTorch operations do the counting. What
            one rank refuses, all ranks refuse.

    Raises:
        ValueError: an argument of wrong shape, length or content; :class:`NoMatchError` if no query matches.

    Example:
        >>> import torch
        >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.0, 1.0]])
        >>> result = evaluate_ranking(query, gallery, [7], [7, 8], [1], [2, 2], max_rank=2)
        >>> result.cmc.tolist(), result.mAP, result.num_valid
        ([1.0, 1.0], 1.0, 1)
    """
    with refused_by_all(process_group, ValueError, "check its arguments"):
        features, labels = (query_features, gallery_features), (query_ids, gallery_ids, query_cams, gallery_cams)
        problem = checked_problem(features, labels, metric, block_bytes, process_group)
        check_scoring(max_rank, ap)
    return score(ranks_by_features(problem), max_rank, ap)


def rank_distances(
    distances: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cams: ArrayLike,
    gallery_cams: ArrayLike,
    max_rank: int = 50,
    ap: AveragePrecision = "standard",
    block_bytes: int = BLOCK_BYTES,
) -> RankingResult:
    """Score given distances, for metrics that :func:`evaluate_ranking` does not have.

    Args:
        distances: (Q, G), smaller is nearer, any real dtype, infinite allowed.
        query_ids, gallery_ids, query_cams, gallery_cams, max_rank, ap, block_bytes: as in
            :func:`evaluate_ranking`.

    Raises:
        ValueError: an argument of wrong shape, length or content; :class:`NoMatchError` if no query matches.

    Example:
        >>> rank_distances([[0.2, 0.1, 0.3]], [1], [1, 2, 1], [1], [2, 2, 3]).mAP  # matches at ranks 2 and 3
        0.5833333333333333
    """
    matrix = as_tensor(distances, "distances")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"distances has shape {tuple(matrix.shape)}; it must be a non-empty (queries, gallery).")
    if matrix.dtype == torch.uint64:
        # Kernels count by signed numbers: in the same order, lower by 2^63.
        matrix = matrix.view(torch.int64) ^ torch.iinfo(torch.int64).min
    labels = check_labels(query_ids, gallery_ids, query_cams, gallery_cams, *matrix.shape)
    check_scoring(max_rank, ap)
    check_block_bytes(block_bytes)
    return score(ranks_by_distances(matrix, labels, block_bytes), max_rank, ap)


def pairwise_distances(query: ArrayLike, gallery: ArrayLike, metric: Metric = "cosine") -> Tensor:
    """Distances of every pair, (Q, G) float64: 1 - cos, or the squared Euclidean distance.

    The distances of a query lie on a grid of 2^-40 of the largest possible one. In which order a matrix product
    sums depends on where a row stands in the matrix; without the grid, copies of one image would differ in
    the last bit and their order would depend on the machine.

    Args:
        query: (Q, d) features.
        gallery: (G, d) features.
        metric: ``"cosine"`` or ``"euclidean"``.

    Raises:
        ValueError: an argument of wrong shape or content, or an unknown metric.

    Example:
        >>> import torch
        >>> query, gallery = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
        >>> pairwise_distances(query, gallery, "euclidean")
        tensor([[25., 16.]], dtype=torch.float64)
    """
    check_metric(metric)
    query, gallery = (features.to(torch.float64) for features in check_shapes(query, gallery))
    squares = [features.square().sum(1).cpu().numpy() for features in (query, gallery)]
    part = PartDistances(query, gallery, distance_scale(*squares, metric), BLOCK_BYTES)
    return on_grid(part.near(slice(None)), part.steps[:, None])


def score(blocks: Iterable[tuple[Pairs, np.ndarray]], max_rank: int, ap: AveragePrecision) -> RankingResult:
    """Figures from the ranks of the matches, queries in blocks, on which they do not depend."""
    scored = []
    # No comprehension: in Python 3.11 it has a frame of its own, and the warning of `blocks` would name another line.
    for block in blocks:
        scored.append(_score_block(*block, ap))
    return figures_of(*map(np.concatenate, zip(*scored, strict=True)), max_rank)


def figures_of(first: np.ndarray, precisions: np.ndarray, penalties: np.ndarray, max_rank: int) -> RankingResult:
    """Figures from those of each query that has a match, as `_score_block` gives them; NoMatchError where none has."""
    if not len(first):
        raise NoMatchError(
            "query_ids share no identity with gallery_ids seen by another camera; no query can be scored. "
            "Check the identities and cameras of the two sets."
        )
    cmc = np.bincount(first[first <= max_rank] - 1, minlength=max_rank).cumsum() / len(first)
    return RankingResult(torch.from_numpy(cmc), float(precisions.mean()), float(penalties.mean()), len(first))


def _score_block(pairs: Pairs, ranks: np.ndarray, ap: AveragePrecision) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First rank, average precision and inverse negative penalty of a block's valid queries."""
    count, begin = pairs.match_counts, pairs.match_offsets[:-1]
    valid = count > 0
    count, begin = count[valid], begin[valid]
    hit = np.arange(1, len(ranks) + 1) - np.repeat(begin, count)
    precision = hit / ranks
    if ap == "trapezoid":
        # One place before a match there are hit - 1 matches; before the first place the precision is 1.
        before = np.where(ranks > 1, (hit - 1) / np.maximum(ranks - 1, 1), 1.0)
        precision = (precision + before) / 2
    return ranks[begin], np.add.reduceat(precision, begin) / count, count / ranks[begin + count - 1]
