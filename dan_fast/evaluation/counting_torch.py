"""Ranks of true matches in PyTorch operations, block by block: for GPUs, and where there is no compiled module."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dan_fast.evaluation.distances import PartDistances
from dan_fast.evaluation.divided import Division
from dan_fast.evaluation.pairs import Labels, Pairs, pairs_in_blocks

# Bytes of temporaries for each pair of a query and a gallery image that is compared at once.
_ENTRY_BYTES = 64
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


def ranks_by_distances(distances: Tensor, labels: Labels, budget: int) -> Iterator[tuple[Pairs, np.ndarray]]:
    """As `dan_fast.evaluation.counting.ranks_by_distances`, of (Q, G) distances without NaN."""
    gallery = distances.shape[1]
    wide = torch.float64 if distances.is_floating_point() else torch.int64
    for pairs in pairs_in_blocks(labels, _ENTRY_BYTES * min(gallery, _columns(budget)), _PAIR_BYTES, budget):
        block = distances[pairs.rows]
        queries, places = _indices(pairs, distances.device)
        matches, buckets = prepare(pairs, block[queries, places].to(wide))
        for first in range(0, gallery, _columns(budget)):
            values = block[:, first : first + _columns(budget)].to(wide)
            _count(
                values,
                first,
                matches,
                matches.distances,
                matches.distances,
                buckets,
                lambda q, g, v=values, f=first: v[q, g - f],
            )
        yield pairs, _ranks(buckets, matches)


def features_bytes(distances: PartDistances, images: int) -> int:
    """What a query takes that is compared with so many images by its features."""
    columns = max(1, min(_columns(distances.budget), distances.columns))
    return _ENTRY_BYTES * min(images, columns) + 16 * distances.query.shape[1]


def ranks_of_part(
    distances: PartDistances, labels: Labels, budget: int, query_bytes: int, division: Division
) -> Iterator[tuple[Pairs, np.ndarray]]:
    """As `ranks_by_distances`, of features, for the rank that holds a part of the gallery; collective.

    Counts of all parts add up to ranks.

    Args:
        distances: of the queries and the part; `reranking` has its own, with the same attributes.
        labels: of the whole gallery.
        budget: bytes that may be allocated at a time.
        query_bytes: that a query takes beside its pairs.
        division: of the gallery.
    """
    images, columns = distances.images, max(1, min(_columns(budget), distances.columns))
    for pairs in pairs_in_blocks(labels, query_bytes, _PAIR_BYTES, budget):
        block = distances.of_rows(pairs.rows)
        matches, buckets = prepare(pairs, exact_of_pairs(block, pairs, division))
        if division.rank > 0:  # the junk of all parts is taken out once
            buckets.zero_()
        bounds = matches.distances - block.uncertainty, matches.distances + block.uncertainty
        for first in range(0, images.stop - images.start, columns):
            values = block.near(slice(first, first + columns))
            _count(values, images.start + first, matches, *bounds, buckets, block.exact)
        yield pairs, _ranks(division.add_up(buckets), matches)


def exact_of_pairs(block: PartDistances, pairs: Pairs, division: Division) -> Tensor:
    """(pairs,) distances of a block's queries, each from the rank that holds its image of the gallery; collective."""
    queries, places = _indices(pairs, block.uncertainty.device)
    held = (places >= block.images.start) & (places < block.images.stop)
    distances = torch.zeros(len(places), dtype=torch.float64, device=places.device)
    distances[held] = block.exact(queries[held], places[held])
    return division.add_up(distances)


def _columns(budget: int) -> int:
    return max(1, budget // (8 * _ENTRY_BYTES))


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


def _count(
    values: Tensor,
    first: int,
    matches: Matches,
    lower: Tensor,
    upper: Tensor,
    buckets: Tensor,
    exact: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Adds each of the (b, columns) values to the bucket of the first match that it comes before.

    Below `lower` a value comes before the match for certain, above `upper` after it; between them
    `exact(queries, places)` decides.
    """
    if matches.distances.shape[1] == 0:
        return
    bucket, near = near_matches(values, matches, lower, upper)
    queries, columns = near.nonzero(as_tuple=True)
    places = columns + first
    bucket[queries, columns] = _exact_bucket(matches, queries, exact(queries, places), places)
    _add(
        buckets,
        torch.arange(len(values), device=values.device)[:, None].expand_as(bucket).reshape(-1),
        bucket.reshape(-1),
        1,
    )


def near_matches(values: Tensor, matches: Matches, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """How many matches' `lower` each of the (b, c) values reaches, and whether it is not above the last one's `upper`.

    Where it is above, it is nowhere between a match's `lower` and `upper`.
    """
    bucket = torch.searchsorted(lower.contiguous(), values.contiguous(), right=True)
    bucket = bucket.minimum(matches.counts[:, None])
    return bucket, (bucket > 0) & ~(values > upper.gather(1, (bucket - 1).clamp(min=0)))


def _ranks(buckets: Tensor, matches: Matches) -> np.ndarray:
    ranks = 1 + buckets.cumsum(1)[:, :-1]
    taken = torch.arange(ranks.shape[1], device=ranks.device) < matches.counts[:, None]
    return ranks[taken].cpu().numpy()
