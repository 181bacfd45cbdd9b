"""Ranks of true matches in PyTorch operations, block by block: for GPUs, and where there is no compiled module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dan_fast.evaluation.distances import (
    DistanceScale,
    Metric,
    distance_scale,
    distances_of_dots,
    on_grid,
    square_norms,
    tree_dots,
)
from dan_fast.evaluation.pairs import Labels, Pairs, pairs_in_blocks

# Bytes of temporaries for each pair of a query and a gallery image that is compared at once.
_ENTRY_BYTES = 64
_PAIR_BYTES = 160


class _Matches(NamedTuple):
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
    """Blocks of queries and the ranks of their matches, ascending within a query.

    Args:
        distances: (Q, G) without NaN, any real dtype.
        labels: identities and cameras.
        budget: bytes that may be allocated at a time.
    """
    gallery = distances.shape[1]
    wide = torch.float64 if distances.is_floating_point() else torch.int64
    for pairs in pairs_in_blocks(labels, _ENTRY_BYTES * min(gallery, _columns(budget)), _PAIR_BYTES, budget):
        block = distances[pairs.rows]
        queries, places = _indices(pairs, distances.device)
        matches, buckets = _prepare(pairs, block[queries, places].to(wide))
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


def ranks_by_features(
    query: Tensor, gallery: Tensor, metric: Metric, labels: Labels, budget: int, check: Callable[..., None]
) -> Iterator[tuple[Pairs, np.ndarray]]:
    """As :func:`ranks_by_distances`, of (Q, d) and (G, d) features.

    Args:
        check: called with the squared norms of both before anything is compared; raises if they do not fit.
    """
    squares = square_norms(query, budget), square_norms(gallery, budget)
    check(*squares)
    scale = distance_scale(*squares, metric)
    yield from ranks_of_part(query, gallery, scale, labels, budget, 0, lambda whole: whole)


def ranks_of_part(
    query: Tensor,
    part: Tensor,
    scale: DistanceScale,
    labels: Labels,
    budget: int,
    start: int,
    add_up: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Pairs, np.ndarray]]:
    """As `ranks_by_features`, for who holds a part of the gallery: counts of all parts add up to ranks.

    Args:
        query: (Q, d) features.
        part: (n, d) features of adjacent gallery images.
        scale: of the whole gallery.
        labels: of the whole gallery.
        budget: bytes that may be allocated at a time.
        start: which image of the gallery is the first of `part`.
        add_up: the sum of a tensor over all parts; called twice for each block.
    """
    width, columns = query.shape[1], max(1, min(_columns(budget), budget // (32 * query.shape[1])))
    gallery_norms = torch.from_numpy(scale.gallery_norms).to(part.device)
    part_norms = gallery_norms[start : start + len(part)]
    query_bytes = _ENTRY_BYTES * min(len(labels.gallery_ids), columns) + 16 * width
    for pairs in pairs_in_blocks(labels, query_bytes, _PAIR_BYTES, budget):
        block = query[pairs.rows].to(torch.float64)
        norms, steps = (torch.from_numpy(x[pairs.rows]).to(query.device) for x in (scale.query_norms, scale.steps))

        def exact(queries: Tensor, places: Tensor, block=block, norms=norms, steps=steps) -> Tensor:
            found = []
            for some in torch.arange(len(queries), device=queries.device).split(max(1, budget // (32 * width))):
                q, g = queries[some], places[some]
                dots = tree_dots(block[q], part[g - start])
                found.append(on_grid(distances_of_dots(dots, norms[q], gallery_norms[g], scale.cosine), steps[q]))
            return torch.cat(found) if found else norms[:0]

        queries, places = _indices(pairs, query.device)
        held = (places >= start) & (places < start + len(part))
        distances = norms.new_zeros(len(places))
        distances[held] = exact(queries[held], places[held])
        matches, buckets = _prepare(pairs, add_up(distances))
        if start > 0:  # the junk of all parts is taken out once
            buckets.zero_()
        doubt = _uncertainty(scale, pairs, width).to(query.device)[:, None]
        for first in range(0, len(part), columns):
            last = slice(first, first + columns)
            dots = block @ part[last].to(torch.float64).T
            values = distances_of_dots(dots, norms[:, None], part_norms[last], scale.cosine)
            _count(values, start + first, matches, matches.distances - doubt, matches.distances + doubt, buckets, exact)
        yield pairs, _ranks(add_up(buckets), matches)


def _columns(budget: int) -> int:
    return max(1, budget // (8 * _ENTRY_BYTES))


def _indices(pairs: Pairs, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(pairs.queries).to(device), torch.from_numpy(pairs.places).to(device)


def _uncertainty(scale: DistanceScale, pairs: Pairs, width: int) -> Tensor:
    """How far a distance from a matrix product in float64 may be from the exact one, for each query."""
    unit, steps = 2.0**-53, torch.from_numpy(scale.steps[pairs.rows])
    if scale.cosine:
        return steps + 1.02 * (width + 8) * unit + 2.0**-46
    query, gallery = torch.from_numpy(scale.query_norms[pairs.rows]), float(scale.gallery_norms.max())
    return steps + 2.04 * (width + 8) * unit * (query * gallery).sqrt() + 2.0**-46 * (query + gallery)


def _prepare(pairs: Pairs, distances: Tensor) -> tuple[_Matches, Tensor]:
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
    matches = _Matches(sorted_distances, sorted_places, counts)
    buckets = torch.zeros(len(counts), most + 1, dtype=torch.int64, device=distances.device)
    _add(buckets, queries[junk], _exact_bucket(matches, queries[junk], distances[junk], places[junk]), -1)
    return matches, buckets


def _exact_bucket(matches: _Matches, queries: Tensor, distances: Tensor, places: Tensor) -> Tensor:
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
    matches: _Matches,
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
    bucket = torch.searchsorted(lower.contiguous(), values.contiguous(), right=True)
    bucket = bucket.minimum(matches.counts[:, None])
    near = (bucket > 0) & ~(values > upper.gather(1, (bucket - 1).clamp(min=0)))
    queries, columns = near.nonzero(as_tuple=True)
    places = columns + first
    bucket[queries, columns] = _exact_bucket(matches, queries, exact(queries, places), places)
    _add(
        buckets,
        torch.arange(len(values), device=values.device)[:, None].expand_as(bucket).reshape(-1),
        bucket.reshape(-1),
        1,
    )


def _ranks(buckets: Tensor, matches: _Matches) -> np.ndarray:
    ranks = 1 + buckets.cumsum(1)[:, :-1]
    taken = torch.arange(ranks.shape[1], device=ranks.device) < matches.counts[:, None]
    return ranks[taken].cpu().numpy()
