"""Ranking a gallery for each query, and the figures drawn from it: CMC, mAP and mINP.

The rules are those of Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV
2015): a gallery image of the query's identity taken by the query's own camera is junk and is removed from
that query's list; an identity that no query has (0 by convention) is a distractor, wrong for every query; a query
without a match is left out of all figures. Equal distances keep the order of the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.evaluation.counting import ranks_by_distances, ranks_by_features, ranks_by_shards
from dan_fast.evaluation.distances import Metric, distance_scale, distances_of_dots, on_grid
from dan_fast.evaluation.divided import refused_by_all
from dan_fast.evaluation.pairs import Labels, Pairs

ArrayLike: TypeAlias = Tensor | np.ndarray | Sequence
AveragePrecision: TypeAlias = Literal["standard", "trapezoid"]

BLOCK_BYTES = 64 * 2**20
NO_MATCH = (
    "query_ids share no identity with gallery_ids seen by another camera; no query can be scored. "
    "Check the identities and cameras of the two sets."
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
        metric: ``"cosine"`` (1 - cos) or ``"euclidean"``.
        max_rank: length of the CMC curve; a smaller gallery repeats its last value.
        ap: ``"standard"``, the mean of the precision at each match, or ``"trapezoid"``, the rule of the first
            MATLAB code of Market-1501, which averages the precision at a match with that one place before.
        block_bytes: about how much memory a block of queries may take; a few MB a thread and 50 bytes an image come
            on top. Features of two dtypes, or whose columns are not adjacent, are copied.
        process_group: ranks that each hand in all queries and gallery images of their own, some of them none: the
            gallery is rank 0's images, rank 1's, ... Every rank returns the figures of the whole, to the last bit.
            Identities, cameras and norms are gathered, features are not. The counting is in PyTorch operations. What
            one rank refuses all of them do.

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
        query, gallery = check_shapes(query_features, gallery_features, process_group is not None)
        check_metric(metric)
        labels = check_labels(query_ids, gallery_ids, query_cams, gallery_cams, len(query), len(gallery))
        check_settings(max_rank, ap, block_bytes)
    given = (query, gallery, metric, labels, block_bytes, check_of_squares(query, gallery))
    blocks = ranks_by_features(*given) if process_group is None else ranks_by_shards(process_group, *given)
    return score(blocks, max_rank, ap)


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
    matrix = _as_tensor(distances, "distances")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"distances has shape {tuple(matrix.shape)}; it must be a non-empty (queries, gallery).")
    labels = check_labels(query_ids, gallery_ids, query_cams, gallery_cams, *matrix.shape)
    check_settings(max_rank, ap, block_bytes)

    def not_numbers() -> ValueError:
        return ValueError("distances holds NaN; every query-gallery pair needs a distance.")

    return score(ranks_by_distances(matrix, labels, block_bytes, not_numbers), max_rank, ap)


def pairwise_distances(query: Tensor, gallery: Tensor, metric: Metric = "cosine") -> Tensor:
    """Distances of every pair, (Q, G) float64: 1 - cos, or the squared Euclidean distance.

    The distances of a query lie on a grid of 2^-40 of the largest possible one. In which order a matrix product
    sums depends on where a row stands in the matrix; without the grid, copies of one image would differ in
    the last bit and their order would depend on the machine.

    Example:
        >>> import torch
        >>> query, gallery = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
        >>> pairwise_distances(query, gallery, "euclidean")
        tensor([[25., 16.]], dtype=torch.float64)
    """
    query, gallery = query.to(torch.float64), gallery.to(torch.float64)
    squares = [features.square().sum(1).cpu().numpy() for features in (query, gallery)]
    scale = distance_scale(*squares, metric)
    query_norms, gallery_norms, steps = (
        torch.from_numpy(x).to(query.device) for x in (scale.query_norms, scale.gallery_norms, scale.steps)
    )
    distances = distances_of_dots(query @ gallery.T, query_norms[:, None], gallery_norms, scale.cosine)
    return on_grid(distances, steps[:, None])


def check_features(query_features: ArrayLike, gallery_features: ArrayLike) -> tuple[Tensor, Tensor]:
    """Both feature matrices as tensors on one device, or a ValueError naming the one that does not fit."""
    query, gallery = check_shapes(query_features, gallery_features)
    for name, value in (("query_features", query), ("gallery_features", gallery)):
        # In parts, to bound the temporary memory of the check.
        if not all(bool(torch.isfinite(part).all()) for part in value.split(1024)):
            raise _not_finite(name)
    return query, gallery


def check_shapes(
    query_features: ArrayLike, gallery_features: ArrayLike, may_be_part: bool = False
) -> tuple[Tensor, Tensor]:
    """As `check_features`, without a look at the numbers; the part of a gallery may be empty."""
    query, gallery = (
        _as_tensor(query_features, "query_features"),
        _as_tensor(gallery_features, "gallery_features"),
    )
    for name, value in (("query_features", query), ("gallery_features", gallery)):
        may_be_empty = may_be_part and value is gallery
        if value.ndim != 2 or 0 in value.shape[may_be_empty:]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a non-empty (images, width).")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"gallery_features is {gallery.shape[1]} wide and query_features {query.shape[1]}; "
            "both must come from one embedding."
        )
    dtype = torch.promote_types(query.dtype, gallery.dtype)
    if not dtype.is_floating_point:
        dtype = torch.float64
    return query.to(dtype), gallery.to(query.device, dtype)


def _not_finite(name: str) -> ValueError:
    return ValueError(f"{name} holds NaN or Inf; the embedding that made it has diverged or is broken.")


def check_of_squares(query: Tensor, gallery: Tensor) -> Callable[[np.ndarray, np.ndarray], None]:
    """What finds NaN and Inf by the squared norms, without a copy of the features."""

    def check(query_squares: np.ndarray, gallery_squares: np.ndarray) -> None:
        for name, features, squares in (
            ("query_features", query, query_squares),
            ("gallery_features", gallery, gallery_squares),
        ):
            broken = np.flatnonzero(~np.isfinite(squares))
            if len(broken) and not bool(torch.isfinite(features[broken[0]]).all()):
                raise _not_finite(name)
            if len(broken):
                raise ValueError(
                    f"{name} holds numbers whose squares overflow float64; divide the features by a constant."
                )

    return check


def _as_tensor(value: ArrayLike, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} is missing; ranking needs it.")
    tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    if tensor.is_complex():
        raise ValueError(f"{name} is complex; it must hold real numbers.")
    return tensor


def check_labels(
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cams: ArrayLike,
    gallery_cams: ArrayLike,
    num_query: int,
    num_gallery: int,
) -> Labels:
    """All labels as arrays, or a ValueError naming the one that does not fit."""
    checked = []
    for name, value, expected in (
        ("query_ids", query_ids, num_query),
        ("gallery_ids", gallery_ids, num_gallery),
        ("query_cams", query_cams, num_query),
        ("gallery_cams", gallery_cams, num_gallery),
    ):
        tensor = _as_tensor(value, name)
        if tuple(tensor.shape) != (expected,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({expected},), one for each image.")
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} is {tensor.dtype}; it must hold integers.")
        checked.append(tensor.to("cpu", torch.int64).numpy())
    return Labels(*checked)


def check_metric(metric: Metric) -> None:
    """Raise ValueError for an unknown metric."""
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric is {metric!r}; it must be 'cosine' or 'euclidean'.")


def check_settings(max_rank: int, ap: AveragePrecision, block_bytes: int) -> None:
    """Raise ValueError for a setting that is out of its range."""
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; it must be at least 1.")
    if ap not in ("standard", "trapezoid"):
        raise ValueError(f"ap is {ap!r}; it must be 'standard' or 'trapezoid'.")
    if block_bytes < 1:
        raise ValueError(f"block_bytes is {block_bytes}; it must be at least 1.")


def score(blocks: Iterable[tuple[Pairs, np.ndarray]], max_rank: int, ap: AveragePrecision) -> RankingResult:
    """Figures from the ranks of the matches, queries in blocks; NoMatchError where there are none."""
    found, precision_sum, penalty_sum, num_valid = np.zeros(max_rank, dtype=np.int64), 0.0, 0.0, 0
    for pairs, ranks in blocks:
        first, precisions, penalties = _score_block(pairs, ranks, ap)
        found += np.bincount(first[first <= max_rank] - 1, minlength=max_rank)
        precision_sum += float(precisions.sum())
        penalty_sum += float(penalties.sum())
        num_valid += len(first)
    if num_valid == 0:
        raise NoMatchError(NO_MATCH)
    return RankingResult(
        cmc=torch.from_numpy(found.cumsum() / num_valid),
        mAP=precision_sum / num_valid,
        mINP=penalty_sum / num_valid,
        num_valid=num_valid,
    )


def _score_block(pairs: Pairs, ranks: np.ndarray, ap: AveragePrecision) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First rank, average precision and inverse negative penalty of a block's valid queries."""
    count, begin = pairs.match_counts, pairs.match_offsets[:-1]
    valid = count > 0
    count, begin = count[valid], begin[valid]
    if not len(count):
        return count, np.zeros(0), np.zeros(0)
    hit = np.arange(1, len(ranks) + 1) - np.repeat(begin, count)
    precision = hit / ranks
    if ap == "trapezoid":
        # One place before a match there are hit - 1 matches; before the first place the precision is 1.
        before = np.where(ranks > 1, (hit - 1) / np.maximum(ranks - 1, 1), 1.0)
        precision = (precision + before) / 2
    return ranks[begin], np.add.reduceat(precision, begin) / count, count / ranks[begin + count - 1]
