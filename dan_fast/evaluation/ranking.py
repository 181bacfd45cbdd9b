"""Ranking a gallery for each query, and the figures drawn from it: CMC, mAP and mINP.

The rules are those of Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV
2015): a gallery image of the query's identity taken by the query's own camera is junk and is removed from
that query's list; an identity that no query carries (0 by convention) is a distractor, wrong for everyone; a
query left without a match counts nowhere. Equal distances keep the order of the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

ArrayLike: TypeAlias = Tensor | np.ndarray | Sequence
Metric: TypeAlias = Literal["cosine", "euclidean"]
AveragePrecision: TypeAlias = Literal["standard", "trapezoid"]

# Entries of a block of queries x gallery: about 100 bytes each while it is being sorted.
_BLOCK_ENTRIES = 1 << 21


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
) -> RankingResult:
    """Rank the gallery by feature distance for every query and score the lists.

    Works through the queries in blocks, so the whole query x gallery matrix never exists. Tensors and arrays
    may be on any device and of any floating dtype; distances are formed in float64.

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

    Raises:
        ValueError: an argument of wrong shape, length or content; :class:`NoMatchError` if no query matches.

    Example:
        >>> import torch
        >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.0, 1.0]])
        >>> result = evaluate_ranking(query, gallery, [7], [7, 8], [1], [2, 2], max_rank=2)
        >>> result.cmc.tolist(), result.mAP, result.num_valid
        ([1.0, 1.0], 1.0, 1)
    """
    query, gallery = check_features(query_features, gallery_features)
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric is {metric!r}; it must be 'cosine' or 'euclidean'.")
    labels = _check_labels(query_ids, gallery_ids, query_cams, gallery_cams, len(query), len(gallery), query.device)
    gallery = gallery.to(torch.float64)
    return _score(lambda rows: pairwise_distances(query[rows], gallery, metric), labels, max_rank, ap)


def rank_distances(
    distances: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cams: ArrayLike,
    gallery_cams: ArrayLike,
    max_rank: int = 50,
    ap: AveragePrecision = "standard",
) -> RankingResult:
    """Score given distances, for metrics :func:`evaluate_ranking` does not know (re-ranking, for example).

    Args:
        distances: (Q, G), smaller is nearer, any real dtype, infinite allowed.
        query_ids, gallery_ids, query_cams, gallery_cams, max_rank, ap: as in :func:`evaluate_ranking`.

    Raises:
        ValueError: an argument of wrong shape, length or content; :class:`NoMatchError` if no query matches.

    Example:
        >>> rank_distances([[0.2, 0.1, 0.3]], [1], [1, 2, 1], [1], [2, 2, 3]).mAP  # matches at ranks 2 and 3
        0.5833333333333333
    """
    matrix = _as_tensor(distances, "distances")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"distances has shape {tuple(matrix.shape)}; it must be a non-empty (queries, gallery).")
    if bool(torch.isnan(matrix).any()):
        raise ValueError("distances holds NaN; every query-gallery pair needs a distance.")
    labels = _check_labels(query_ids, gallery_ids, query_cams, gallery_cams, *matrix.shape, matrix.device)
    return _score(lambda rows: matrix[rows], labels, max_rank, ap)


def pairwise_distances(query: Tensor, gallery: Tensor, metric: Metric = "cosine") -> Tensor:
    """Ranking keys of every pair, (Q, G) float64: 1 - cos, or the squared Euclidean distance.

    The keys of a query lie on a grid of 2^-40 of the largest possible one. In which order a matrix product
    sums depends on where a row stands in the matrix; without the grid, copies of one image would differ in
    the last bit and the order among them would be an accident of the machine.

    Example:
        >>> import torch
        >>> query, gallery = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
        >>> pairwise_distances(query, gallery, "euclidean")
        tensor([[25., 16.]], dtype=torch.float64)
    """
    query, gallery = query.to(torch.float64), gallery.to(torch.float64)
    if metric == "cosine":
        query = torch.nn.functional.normalize(query, dim=1, eps=1e-12)
        gallery = torch.nn.functional.normalize(gallery, dim=1, eps=1e-12)
        keys, largest = 1 - query @ gallery.T, torch.ones((), dtype=torch.float64, device=query.device)
    else:
        query_norms, gallery_norms = query.square().sum(1), gallery.square().sum(1)
        keys = query_norms[:, None] + gallery_norms - 2 * query @ gallery.T
        largest = (query_norms[:, None] + gallery_norms.amax()).clamp(min=1e-300)
    # A power of two, so that scaling to the grid and back is exact.
    step = torch.exp2(torch.ceil(torch.log2(largest)) - 40)
    return torch.round(keys / step) * step


def check_features(query_features: ArrayLike, gallery_features: ArrayLike) -> tuple[Tensor, Tensor]:
    """Both feature matrices as tensors on one device, or a ValueError naming the one that does not fit."""
    query, gallery = (
        _as_tensor(query_features, "query_features"),
        _as_tensor(gallery_features, "gallery_features"),
    )
    for name, value in (("query_features", query), ("gallery_features", gallery)):
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a non-empty (images, width).")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or Inf; the embedding that made it has diverged or is broken.")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"gallery_features is {gallery.shape[1]} wide and query_features {query.shape[1]}; "
            "both must come from one embedding."
        )
    return query, gallery.to(query.device)


class _Labels(NamedTuple):
    query_ids: Tensor
    gallery_ids: Tensor
    query_cams: Tensor
    gallery_cams: Tensor


def _as_tensor(value: ArrayLike, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} is missing; ranking needs it.")
    tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    if tensor.is_complex():
        raise ValueError(f"{name} is complex; it must hold real numbers.")
    return tensor


def _check_labels(
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cams: ArrayLike,
    gallery_cams: ArrayLike,
    num_query: int,
    num_gallery: int,
    device: torch.device,
) -> _Labels:
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
        checked.append(tensor.to(device=device, dtype=torch.int64))
    return _Labels(*checked)


def _blocks(num_query: int, num_gallery: int) -> Iterator[slice]:
    rows = max(1, _BLOCK_ENTRIES // num_gallery)
    for start in range(0, num_query, rows):
        yield slice(start, min(start + rows, num_query))


def _score(
    distances_of: Callable[[slice], Tensor], labels: _Labels, max_rank: int, ap: AveragePrecision
) -> RankingResult:
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; it must be at least 1.")
    if ap not in ("standard", "trapezoid"):
        raise ValueError(f"ap is {ap!r}; it must be 'standard' or 'trapezoid'.")
    first_ranks, precisions, penalties = [], [], []
    for rows in _blocks(len(labels.query_ids), len(labels.gallery_ids)):
        first, precision, penalty = _score_block(distances_of(rows), rows, labels, ap)
        first_ranks.append(first)
        precisions.append(precision)
        penalties.append(penalty)
    first_rank = torch.cat(first_ranks)
    num_valid = len(first_rank)
    if num_valid == 0:
        raise NoMatchError(
            "query_ids share no identity with gallery_ids seen by another camera; no query can be scored. "
            "Check the identities and cameras of the two sets."
        )
    found = torch.bincount(first_rank - 1, minlength=max_rank)[:max_rank]
    return RankingResult(
        cmc=found.cumsum(0).to(torch.float64) / num_valid,
        mAP=float(torch.cat(precisions).mean()),
        mINP=float(torch.cat(penalties).mean()),
        num_valid=num_valid,
    )


def _score_block(
    distances: Tensor, rows: slice, labels: _Labels, ap: AveragePrecision
) -> tuple[Tensor, Tensor, Tensor]:
    """First rank, average precision and inverse negative penalty of a block's valid queries, on the CPU."""
    order = torch.argsort(distances, dim=1, stable=True)
    same_id = labels.gallery_ids[order] == labels.query_ids[rows, None]
    junk = same_id & (labels.gallery_cams[order] == labels.query_cams[rows, None])
    matches = same_id & ~junk
    query, position = matches.nonzero(as_tuple=True)  # by query, and nearest first within one
    # Few are left: on the CPU their sums are formed in one order, whatever device ranked them.
    rank = torch.cumsum(~junk, dim=1, dtype=torch.int32)[query, position].to("cpu", torch.int64)
    query, count = query.cpu(), matches.sum(dim=1).cpu()
    end = count.cumsum(0)
    hit = torch.arange(1, len(query) + 1) - (end - count)[query]

    precision = hit / rank.to(torch.float64)
    if ap == "trapezoid":
        # One place before a match there are hit - 1 matches; before the first place the precision is 1.
        before = torch.where(rank > 1, (hit - 1) / (rank - 1).clamp(min=1).to(torch.float64), 1.0)
        precision = (precision + before) / 2
    valid = count > 0
    count, end = count[valid], end[valid]
    total = torch.zeros(len(valid), dtype=torch.float64).index_add_(0, query, precision)
    return rank[end - count], total[valid] / count, count / rank[end - 1].to(torch.float64)
