"""Ranks of true matches in PyTorch operations, block by block: for GPUs, and where there is no compiled module."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dan_fast.evaluation.distances import ENTRY_BYTES, PartDistances, distance_scale, square_norms
from dan_fast.evaluation.divided import Division, refused_by_all
from dan_fast.evaluation.pairs import Labels, Pairs, pairs_in_blocks
from dan_fast.evaluation.problem import RankingProblem

# Bytes of temporaries for each gallery image of a query's identity.
_PAIR_BYTES = 160


class Matches(NamedTuple):
    """True matches of a block of queries, nearest first, padded to the query with the most.

    Attributes:
        distances: (b, M) int64 or float64.
        places: (b, M) int64 places in the gallery.
        counts: (b,) int64 matches of each query.
    """

    distances: Tensor
    places: Tensor
    counts: Tensor


class _GivenDistances:
    """(Q, G) distances without NaN, as `ranks_of_part` takes them: near ones are exact."""

    def __init__(self, matrix: Tensor, columns: int) -> None:
        self.matrix, self.columns, self.images = matrix, columns, slice(0, matrix.shape[1])
        self.wide = torch.float64 if matrix.is_floating_point() else torch.int64
        self.uncertainty = torch.zeros((), dtype=self.wide, device=matrix.device)

    def of_rows(self, rows: slice) -> "_GivenDistances":
        return _GivenDistances(self.matrix[rows], self.columns)

    def near(self, columns: slice) -> Tensor:
        return self.matrix[:, columns].to(self.wide)

    def exact(self, queries: Tensor, places: Tensor) -> Tensor:
        return self.matrix[queries, places].to(self.wide)


def ranks_by_distances(distances: Tensor, labels: Labels, budget: int) -> Iterator[tuple[Pairs, np.ndarray]]:
    """As `dan_fast.evaluation.counting.ranks_by_distances`, of (Q, G) distances without NaN."""
    gallery, columns = distances.shape[1], max(1, budget // (8 * ENTRY_BYTES))
    given, query_bytes = _GivenDistances(distances, columns), ENTRY_BYTES * min(gallery, columns)
    return ranks_of_part(given, labels, budget, query_bytes, Division(None, [gallery]))


def ranks_by_features(problem: RankingProblem) -> Iterator[tuple[Pairs, np.ndarray]]:
    """As `dan_fast.evaluation.counting.ranks_by_features`, of a gallery that may be divided over ranks; collective."""
    query, budget = problem.query, problem.block_bytes
    division, labels, squares = whole_gallery(problem)
    scale = distance_scale(*squares, problem.metric)
    distances = PartDistances(query, problem.gallery, scale, budget, division.rows.start)
    query_bytes = ENTRY_BYTES * min(len(division), distances.columns) + 16 * query.shape[1]
    return ranks_of_part(distances, labels, budget, query_bytes, division)


def whole_gallery(problem: RankingProblem) -> tuple[Division, Labels, tuple[np.ndarray, np.ndarray]]:
    """How a gallery is divided, its labels, and the squared norms of the queries and of it; collective.

    Args:
        problem: without a group its gallery is the whole.
    """
    query, shard, group = problem.query, problem.gallery, problem.group
    with refused_by_all(group, ValueError, "check its part of the gallery"):
        own = square_norms(query, problem.block_bytes), square_norms(shard, problem.block_bytes)
        problem.check_squares(*own)
    division = Division.of_part(group, shard)
    ids, cams, squares = (
        division.gather(x, shard.device) for x in (problem.labels.gallery_ids, problem.labels.gallery_cams, own[1])
    )
    if not len(division):
        raise ValueError("gallery_features has no image on any rank; at least one of them needs some.")
    return division, problem.labels._replace(gallery_ids=ids, gallery_cams=cams), (own[0], squares)


def ranks_of_part(
    distances: PartDistances, labels: Labels, budget: int, query_bytes: int, division: Division
) -> Iterator[tuple[Pairs, np.ndarray]]:
    """As `ranks_by_distances`, for the rank that holds a part of the gallery; collective.

    Counts of all parts add up to ranks.

    Args:
        distances: of the queries and the part, or others with the same attributes.
        labels: of the whole gallery.
        budget: bytes that may be allocated at a time.
        query_bytes: that a query takes beside its pairs.
        division: of the gallery.
    """
    images = distances.images
    for pairs in pairs_in_blocks(labels, query_bytes, _PAIR_BYTES, budget):
        block = distances.of_rows(pairs.rows)
        matches, buckets = prepare(pairs, exact_of_pairs(block, pairs, division))
        if division.rank > 0:  # the junk of all parts is taken out once
            buckets.zero_()
        for first in range(0, images.stop - images.start, distances.columns):
            _count(block, slice(first, first + distances.columns), matches, buckets)
        yield pairs, _ranks(division.add_up(buckets), matches)


def exact_of_pairs(block: PartDistances, pairs: Pairs, division: Division) -> Tensor:
    """(pairs,) distances of a block's queries, each from the rank that holds its image of the gallery; collective."""
    queries, places = _indices(pairs, block.uncertainty.device)
    held = (places >= block.images.start) & (places < block.images.stop)
    exact = block.exact(queries[held], places[held])
    distances = exact.new_zeros(len(places))
    distances[held] = exact
    return division.add_up(distances)


def _indices(pairs: Pairs, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(pairs.queries).to(device), torch.from_numpy(pairs.places).to(device)


def prepare(pairs: Pairs, distances: Tensor) -> tuple[Matches, Tensor]:
    """Matches in order, and the (b, M + 1) buckets with the junk taken out beforehand."""
    queries, places = _indices(pairs, distances.device)
    counts = torch.from_numpy(pairs.match_counts).to(distances.device)
    junk = torch.from_numpy(pairs.junk).to(distances.device).bool()
    most = int(pairs.match_counts.max())
    q, d, p = queries[~junk], distances[~junk], places[~junk]
    # Pairs come by query and place: two stable sorts leave them by query, distance and place.
    by_distance = torch.argsort(d, stable=True)
    order = by_distance[torch.argsort(q[by_distance], stable=True)]
    offsets = torch.from_numpy(pairs.match_offsets).to(distances.device)
    column = torch.arange(len(q), device=distances.device) - offsets[q]
    largest = torch.inf if distances.is_floating_point() else torch.iinfo(distances.dtype).max
    sorted_distances = distances.new_full((len(counts), most), largest)
    sorted_places = torch.full((len(counts), most), torch.iinfo(torch.int64).max, device=distances.device)
    sorted_distances[q, column], sorted_places[q, column] = d[order], p[order]
    matches = Matches(sorted_distances, sorted_places, counts)
    buckets = torch.zeros(len(counts), most + 1, dtype=torch.int64, device=distances.device)
    _add(buckets, queries[junk], _exact_bucket(matches, queries[junk], distances[junk], places[junk]), -1)
    return matches, buckets


def _exact_bucket(matches: Matches, queries: Tensor, distances: Tensor, places: Tensor) -> Tensor:
    """How many of a query's matches do not come after each (distance, place)."""
    low, high = torch.zeros_like(queries), matches.counts[queries]
    for _ in range(matches.distances.shape[1].bit_length()):
        middle = ((low + high) // 2).clamp(max=max(0, matches.distances.shape[1] - 1))
        match_distance, match_place = matches.distances[queries, middle], matches.places[queries, middle]
        before = (match_distance < distances) | ((match_distance == distances) & (match_place <= places))
        reached = before & (low < high)
        low, high = torch.where(reached, middle + 1, low), torch.where(reached, high, middle.minimum(high))
    return low


def _add(buckets: Tensor, queries: Tensor, columns: Tensor, number: int) -> None:
    flat = queries * buckets.shape[1] + columns
    buckets += number * torch.bincount(flat, minlength=buckets.numel()).view_as(buckets)


def _count(block: PartDistances, columns: slice, matches: Matches, buckets: Tensor) -> None:
    """Add each image at some columns of the part to the bucket of the first match that it comes before."""
    if matches.distances.shape[1] == 0:
        return
    bucket, near = near_matches(block.near(columns), matches, block.uncertainty)
    queries, found = near.nonzero(as_tuple=True)
    places = found + (block.images.start + columns.start)
    bucket[queries, found] = _exact_bucket(matches, queries, block.exact(queries, places), places)
    rows = torch.arange(len(bucket), device=bucket.device)[:, None].expand_as(bucket)
    _add(buckets, rows.reshape(-1), bucket.reshape(-1), 1)


def near_matches(values: Tensor, matches: Matches, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
    """How many matches each of (b, c) distances may come after, and whether its exact distance has to decide.

    Args:
        values: the distances.
        matches: of the b queries.
        uncertainty: how far the distances may be from the exact ones, which those of matches are; (b, 1) or a number.
    """
    bucket = torch.searchsorted(matches.distances - uncertainty, values.contiguous(), right=True)
    bucket = bucket.minimum(matches.counts[:, None])
    last = (matches.distances + uncertainty).gather(1, (bucket - 1).clamp(min=0))
    return bucket, (bucket > 0) & ~(values > last)


def _ranks(buckets: Tensor, matches: Matches) -> np.ndarray:
    ranks = 1 + buckets.cumsum(1)[:, :-1]
    taken = torch.arange(ranks.shape[1], device=ranks.device) < matches.counts[:, None]
    return ranks[taken].cpu().numpy()
