"""The single-shot protocol of CUHK03's first papers: one gallery image of each identity, drawn at random, 100 times."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dan_fast.evaluation.distances import Metric
from dan_fast.evaluation.pairs import Labels
from dan_fast.evaluation.ranking import (
    BLOCK_BYTES,
    NO_MATCH,
    ArrayLike,
    NoMatchError,
    RankingResult,
    check_features,
    check_labels,
    check_metric,
    check_settings,
    pairwise_distances,
)


def evaluate_single_shot(
    query_features: ArrayLike,
    gallery_features: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cams: ArrayLike,
    gallery_cams: ArrayLike,
    metric: Metric = "cosine",
    max_rank: int = 50,
    repeats: int = 100,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> RankingResult:
    """Rank one image of each gallery identity, drawn anew for each repeat; the figures are means.

    This is the classic protocol of CUHK03 (Li et al., "DeepReID: Deep Filter Pairing Neural Network for Person
    Re-identification", CVPR 2014). A query is searched for among images of other cameras than its own, one of each
    identity that has any; a query whose identity has none counts nowhere. With one match a query, mAP and mINP
    are both the mean of 1 / rank. Equal distances keep the order of the gallery.

    Args:
        query_features, gallery_features, query_ids, gallery_ids, query_cams, gallery_cams, metric, max_rank: as in
            :func:`dan_fast.evaluation.evaluate_ranking`.
        repeats: how often the gallery is drawn.
        seed: of all draws; the same seed draws the same images, whatever the features are.
        block_bytes: about how much memory a block of queries may take.

    Raises:
        ValueError: an argument of wrong shape, length or content; `NoMatchError` if no query matches.

    Example:
        >>> import torch
        >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.8, 0.3]])
        >>> evaluate_single_shot(query, gallery, [7], [7, 8, 7], [1], [2, 2, 2]).mAP
        1.0
    """
    query, gallery = check_features(query_features, gallery_features)
    check_metric(metric)
    check_settings(max_rank, "standard", block_bytes)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1.")
    labels = check_labels(query_ids, gallery_ids, query_cams, gallery_cams, len(query), len(gallery))
    found: list[np.ndarray] = []
    rows = max(1, block_bytes // (64 * len(gallery)))
    for cam in np.unique(labels.query_cams):
        draws = [_draw(labels, cam, seed, repeat) for repeat in range(repeats)]
        queries = np.flatnonzero((labels.query_cams == cam) & np.isin(labels.query_ids, labels.gallery_ids[draws[0]]))
        for block in np.split(queries, range(rows, len(queries), rows)) if len(queries) else ():
            distances = pairwise_distances(query[torch.from_numpy(block).to(query.device)], gallery, metric)
            found += [_ranks(distances, labels, block, drawn) for drawn in draws]
    if not found:
        raise NoMatchError(NO_MATCH)
    ranks = np.concatenate(found)
    cmc = np.bincount(ranks[ranks <= max_rank] - 1, minlength=max_rank).cumsum() / len(ranks)
    mean = float((1 / ranks).mean())
    return RankingResult(torch.from_numpy(cmc), mean, mean, len(ranks) // repeats)


def _draw(labels: Labels, cam: int, seed: int, repeat: int) -> np.ndarray:
    """One image of each identity, from other cameras than `cam`: places in the gallery, by identity."""
    order = np.random.default_rng([seed, repeat]).permutation(len(labels.gallery_ids))
    order = order[labels.gallery_cams[order] != cam]
    _, first = np.unique(labels.gallery_ids[order], return_index=True)
    return order[first]


def _ranks(distances: Tensor, labels: Labels, queries: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Ranks of the queries' matches among the drawn images."""
    places = torch.from_numpy(drawn).to(distances.device)
    column = torch.from_numpy(np.searchsorted(labels.gallery_ids[drawn], labels.query_ids[queries]))
    column = column.to(distances.device)
    values = distances[:, places]
    match, match_place = values.gather(1, column[:, None]), places[column][:, None]
    before = (values < match) | ((values == match) & (places < match_place))
    return 1 + before.sum(1).cpu().numpy()
