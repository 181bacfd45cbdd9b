"""The single-shot protocol of CUHK03's first papers: one gallery image of each identity, drawn at random, 100 times."""

import numpy as np
import torch

from dan_fast.core.defaults import default_cpu
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.evaluation.counting_torch import exact_of_pairs, near_matches, prepare, whole_gallery
from dan_fast.evaluation.distances import ENTRY_BYTES, Metric, PartDistances, distance_scale
from dan_fast.evaluation.divided import Division, refused_by_all
from dan_fast.evaluation.pairs import Labels, pairs_in_blocks
from dan_fast.evaluation.problem import BLOCK_BYTES, ArrayLike, check_scoring, check_whole, checked_problem
from dan_fast.evaluation.ranking import RankingResult, figures_of


@default_cpu()
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
    process_group: ProcessGroup | None = None,
) -> RankingResult:
    """Rank one image of each gallery identity, drawn anew for each repeat; the figures are means.

    This is the classic protocol of CUHK03 (Li et al., "DeepReID: Deep Filter Pairing Neural Network for Person
    Re-identification", CVPR 2014). A query is searched for among images of other cameras than its own, one of each
    identity that has any; a query whose identity has none is not counted. With one match a query, mAP and mINP are both
    the mean of 1 / rank. Equal distances keep the order of the gallery.

    Args:
        query_features, gallery_features, query_ids, gallery_ids, query_cams, gallery_cams, metric, max_rank: as in
            :func:`dan_fast.evaluation.evaluate_ranking`.
        repeats: how often the gallery is drawn.
        seed: of all draws; the same seed draws the same images, whatever the features are.
        block_bytes: about how much memory a block of queries may take.
        process_group: ranks over which the gallery is divided, as in :func:`dan_fast.evaluation.evaluate_ranking`.

    Raises:
        ValueError: an argument of wrong shape, length or content; `NoMatchError` if no query matches.

    Example:
        >>> import torch
        >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.8, 0.3]])
        >>> evaluate_single_shot(query, gallery, [7], [7, 8, 7], [1], [2, 2, 2]).mAP
        1.0
    """
    with refused_by_all(process_group, ValueError, "check its arguments"):
        features, labels = (query_features, gallery_features), (query_ids, gallery_ids, query_cams, gallery_cams)
        problem = checked_problem(features, labels, metric, block_bytes, process_group)
        check_scoring(max_rank, "standard")
        check_whole("repeats", repeats)
        check_whole("seed", seed, least=0)
    division, labels, squares = whole_gallery(problem)
    scale = distance_scale(*squares, metric)
    distances = PartDistances(problem.query, problem.gallery, scale, block_bytes, division.rows.start)
    found = [np.zeros(0, dtype=np.int64)]
    rows = max(1, block_bytes // (ENTRY_BYTES * len(division)))
    for cam in np.unique(labels.query_cams):
        draws = [_draw(labels, cam, seed, repeat) for repeat in range(repeats)]
        queries = np.flatnonzero((labels.query_cams == cam) & np.isin(labels.query_ids, labels.gallery_ids[draws[0]]))
        for block in np.split(queries, range(rows, len(queries), rows)) if len(queries) else ():
            found.append(_ranks(distances, labels, division, block, draws))
    ranks = np.concatenate(found)
    result = figures_of(ranks, 1 / ranks, 1 / ranks, max_rank)
    return result._replace(num_valid=result.num_valid // repeats)


def _draw(labels: Labels, cam: int, seed: int, repeat: int) -> np.ndarray:
    """One image of each identity, from other cameras than `cam`: places in the gallery, by identity."""
    order = np.random.default_rng([seed, repeat]).permutation(len(labels.gallery_ids))
    order = order[labels.gallery_cams[order] != cam]
    _, first = np.unique(labels.gallery_ids[order], return_index=True)
    return order[first]


def _ranks(
    distances: PartDistances, labels: Labels, division: Division, queries: np.ndarray, draws: list[np.ndarray]
) -> np.ndarray:
    """Ranks of the queries' matches among the images of each draw, draw by draw; collective."""
    own, block = division.rows, distances.of_rows(queries)
    of_block = labels._replace(query_ids=labels.query_ids[queries], query_cams=labels.query_cams[queries])
    (pairs,) = pairs_in_blocks(of_block, 0, 0, 1)
    pair_distances = exact_of_pairs(block, pairs, division)
    matches, _ = prepare(pairs, pair_distances)
    # Where a product of matrices cannot tell whether an image comes before a match, its exact distance is taken.
    values = block.near(slice(None))
    rows, columns = near_matches(values, matches, block.uncertainty)[1].nonzero(as_tuple=True)
    values[rows, columns] = block.exact(rows, columns + own.start)
    # Ascending, as pairs come by query and place.
    keys = pairs.queries * len(division) + pairs.places
    before = []
    for drawn in draws:
        match_places = drawn[np.searchsorted(labels.gallery_ids[drawn], of_block.query_ids)]
        found = np.searchsorted(keys, np.arange(len(queries)) * len(division) + match_places)
        match = pair_distances[torch.from_numpy(found).to(values.device), None]
        places = torch.from_numpy(drawn[(drawn >= own.start) & (drawn < own.stop)]).to(values.device)
        match_place = torch.from_numpy(match_places).to(values.device)[:, None]
        compared = values[:, places - own.start]
        before.append(((compared < match) | ((compared == match) & (places < match_place))).sum(1))
    return 1 + division.add_up(torch.cat(before)).cpu().numpy()
