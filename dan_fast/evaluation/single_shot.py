"""The single-shot protocol of CUHK03's first papers: one gallery image of each identity, drawn at random, 100 times."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dan_fast.evaluation.keys import Metric
from dan_fast.evaluation.pairs import Labels
from dan_fast.evaluation.ranking import (
    BLOCK_BYTES,
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
    """Rank one image of each gallery identity, drawn anew for each repeat, and average over repeats and queries.

    This is the classic protocol of CUHK03 (Li et al., "DeepReID: Deep Filter Pairing Neural Network for Person
    Re-identification", CVPR 2014). A query's own identity is drawn from the images of other cameras than the query's;
    a query without such an image counts nowhere. A query has one match in a repeat, so mAP and mINP are both the mean
    of 1 / rank. Equal distances keep the order of the gallery.

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
        >>> evaluate_single_shot(query, gallery, [7], [7, 8, 7], [1], [2, 2, 2]).cmc[0].item()
        1.0
    """
    query, gallery = check_features(query_features, gallery_features)
    check_metric(metric)
    check_settings(max_rank, "standard", block_bytes)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1.")
    labels = check_labels(query_ids, gallery_ids, query_cams, gallery_cams, len(query), len(gallery))
    draws = [_draw(labels, np.random.default_rng([seed, repeat])) for repeat in range(repeats)]
    valid = np.flatnonzero(draws[0][1] >= 0)
    if not len(valid):
        raise NoMatchError(
            "query_ids share no identity with gallery_ids seen by another camera; no query can be scored. "
            "Check the identities and cameras of the two sets."
        )
    found, inverse_sum = np.zeros(max_rank, dtype=np.int64), 0.0
    rows = max(1, block_bytes // (64 * len(gallery)))
    for first in range(0, len(valid), rows):
        block = valid[first : first + rows]
        distances = pairwise_distances(query[torch.from_numpy(block).to(query.device)], gallery, metric)
        for drawn, matches in draws:
            ranks = _ranks(distances, labels, block, drawn, matches[block])
            found += np.bincount(ranks[ranks <= max_rank] - 1, minlength=max_rank)
            inverse_sum += float((1 / ranks).sum())
    count = len(valid) * repeats
    mean = inverse_sum / count
    return RankingResult(torch.from_numpy(found.cumsum() / count), mean, mean, len(valid))


def _draw(labels: Labels, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image of each identity; and each query's match, its identity's first drawn of another camera, or -1."""
    order = random.permutation(len(labels.gallery_ids))
    ids, cams = labels.gallery_ids[order], labels.gallery_cams[order]
    present, first = np.unique(ids, return_index=True)
    # Of those that another camera took than the first of its identity, again the first.
    other = np.flatnonzero(cams != cams[first][np.searchsorted(present, ids)])
    with_other, second = np.unique(ids[other], return_index=True)
    matches = np.full(len(labels.query_ids), -1)
    for known, places in ((with_other, other[second]), (present, first)):
        at = np.minimum(np.searchsorted(known, labels.query_ids), max(0, len(known) - 1))
        if len(known):
            candidate = places[at]
            fits = (known[at] == labels.query_ids) & (cams[candidate] != labels.query_cams)
            matches = np.where(fits, order[candidate], matches)
    return order[first], matches


def _ranks(
    distances: Tensor, labels: Labels, queries: np.ndarray, drawn: np.ndarray, matches: np.ndarray
) -> np.ndarray:
    """Ranks of the matches among the drawn images of other identities."""
    places, match_places = (torch.from_numpy(x).to(distances.device) for x in (drawn, matches))
    others = torch.from_numpy(labels.gallery_ids[drawn] != labels.query_ids[queries, None]).to(distances.device)
    values, match = distances[:, places], distances.gather(1, match_places[:, None])
    before = (values < match) | ((values == match) & (places < match_places[:, None]))
    return 1 + (before & others).sum(1).cpu().numpy()
