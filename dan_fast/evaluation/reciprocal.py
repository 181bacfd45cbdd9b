"""Encodings of images by their reciprocal neighbours, for :mod:`dan_fast.evaluation.reranking`.

Each rank encodes its own images, which it compares with those of the others as these go round in blocks. Exact
distances decide, so that the encodings have the same bits however the images are divided.
"""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dan_fast.distributed.collectives import gather_parts
from dan_fast.evaluation.distances import ENTRY_BYTES, Metric, PartDistances, distance_scale, on_grid
from dan_fast.evaluation.divided import Division

# Rows of sparse products at a time: their results are many times as large as what is kept of them.
_SPARSE_ROWS = 2048
# Bytes of temporaries for each number of the images that go round.
_NUMBER_BYTES = 8


class Share(NamedTuple):
    """Images of this rank: (n, d) features, and the (n,) int64 places of the images among all of them, ascending."""

    features: Tensor
    places: np.ndarray


class Images:
    """All images, the queries first; a rank has a share of the queries, and its part of the gallery.

    Args:
        query: (Q, d) features, on all ranks.
        gallery: (n, d) features of this rank's part.
        squares: (Q,) and (G,) squared norms of all.
        metric: by which images are compared.
        budget: bytes of temporaries at a time.
        division: of the gallery.
    """

    def __init__(
        self,
        query: Tensor,
        gallery: Tensor,
        squares: tuple[np.ndarray, np.ndarray],
        metric: Metric,
        budget: int,
        division: Division,
    ) -> None:
        self.query, self.budget = query, budget
        self.divisions = Division.of_images(division.group, len(query)), division
        everything = np.concatenate(squares)
        self.scale = distance_scale(everything, everything, metric)
        of_queries, of_gallery = (each.rows for each in self.divisions)
        queries = len(query)
        self.shares = (
            Share(query[of_queries], np.arange(of_queries.start, of_queries.stop)),
            Share(gallery, np.arange(queries + of_gallery.start, queries + of_gallery.stop)),
        )
        self.places = np.concatenate([share.places for share in self.shares])

    def __len__(self) -> int:
        return len(self.scale.steps)

    @property
    def division(self) -> Division:
        """Of all images, each rank's queries before its part of the gallery."""
        sizes = [sum(both) for both in zip(*(each.sizes for each in self.divisions), strict=True)]
        return Division(self.divisions[0].group, sizes)

    def gather(self, *parts: np.ndarray) -> np.ndarray:
        """What the shares have of each image, for all images; collective."""
        device = self.query.device
        return np.concatenate([each.gather(part, device) for each, part in zip(self.divisions, parts, strict=True)])

    def compared(self) -> Iterator[tuple[int, Tensor, PartDistances]]:
        """Each share beside the images of all ranks, some at a time; collective.

        Yields:
            (which share, (c,) int64 places of the images that it is compared with, ascending, the distances).
        """
        count = max(1, self.budget // (_NUMBER_BYTES * self.query.shape[1]))
        of_gallery = self.divisions[1].rounds(self.shares[1].features, count)
        of_queries = Division(None, [len(self.query)]).rounds(self.query, count)
        for places, images in chain(((place + len(self.query), part) for place, part in of_gallery), of_queries):
            images = images.to(torch.float64)
            for number, share in enumerate(self.shares):
                scale = self.scale.of(share.places, places.numpy())
                if len(share.places):
                    yield number, places.to(images.device), PartDistances(share.features, images, scale, self.budget)


class Nearest(NamedTuple):
    """Nearest images of the n images of a share, and their largest distances.

    Attributes:
        distances: (n, count) float64, ascending.
        places: (n, count) int64; of equal distances the first place comes first.
        largest: (n,) float64.
    """

    distances: Tensor
    places: Tensor
    largest: Tensor


def nearest(images: Images, count: int) -> list[Nearest]:
    """The nearest images of each image of this rank, by share; collective."""
    count, device = min(count, len(images)), images.query.device
    found = []
    for share in images.shares:
        distances = torch.full((len(share.places), count), torch.inf, dtype=torch.float64, device=device)
        found.append(Nearest(distances, torch.zeros_like(distances, dtype=torch.int64), distances[:, 0] * -1))
    for number, places, distances in images.compared():
        each = max(1, images.budget // (ENTRY_BYTES * len(places)))
        for first in range(0, len(distances.query), each):
            rows = slice(first, first + each)
            _add(Nearest(*(part[rows] for part in found[number])), places, distances.of_rows(rows))
    return found


def _add(found: Nearest, places: Tensor, distances: PartDistances) -> None:
    """Take more images into account, by the least and the largest that their exact distances may be."""
    near, steps, error = distances.near(slice(None)), distances.steps, distances.error[:, 0]

    def least(row: Tensor | slice, distance: Tensor) -> Tensor:
        return on_grid(distance - error[row], steps[row])

    def most(row: Tensor | slice, distance: Tensor) -> Tensor:
        return on_grid(distance + error[row], steps[row])

    # Both ascend with the distance, so those of a row's extremes are the extremes. Only of what is within their reach
    # of a limit are they formed.
    everywhere, reach = slice(None), error + steps
    largest = torch.maximum(found.largest, least(everywhere, near.amax(1)))
    row, column = (near >= (largest - reach)[:, None]).nonzero(as_tuple=True)
    high = most(row, near[row, column])
    open_ones = (high > largest[row]) & (least(row, near[row, column]) < high)
    row, column = row[open_ones], column[open_ones]
    found.largest.copy_(largest.scatter_reduce(0, row, distances.exact(row, column), "amax"))

    count = found.distances.shape[1]
    limit = found.distances[:, -1]
    if len(places) >= count:
        limit = limit.minimum(most(everywhere, near.topk(count, dim=1, largest=False).values[:, -1]))
    row, column = (near <= (limit + reach)[:, None]).nonzero(as_tuple=True)
    within = least(row, near[row, column]) <= limit[row]
    row, column = row[within], column[within]
    value = least(row, near[row, column])
    open_ones = value < most(row, near[row, column])
    value[open_ones] = distances.exact(row[open_ones], column[open_ones])
    # With the nearest so far, by row, distance and place.
    rows = torch.arange(len(near), device=row.device)
    row = torch.cat([row, rows.repeat_interleave(count)])
    value = torch.cat([value, found.distances.reshape(-1)])
    place = torch.cat([places[column], found.places.reshape(-1)])
    order = torch.argsort(place, stable=True)
    for key in (value, row):
        order = order[torch.argsort(key[order], stable=True)]
    begin = torch.searchsorted(row[order], rows)
    taken = order[begin[:, None] + torch.arange(count, device=row.device)]
    found.distances.copy_(value[taken])
    found.places.copy_(place[taken])


def encodings(images: Images, neighbours: np.ndarray, largest: np.ndarray, k1: int) -> sparse.csr_array:
    """(n, N) weights exp(-distance) over the expanded reciprocal neighbours of this rank's images; collective.

    Args:
        images: N of them, n on this rank.
        neighbours: (N, count) nearest images of each.
        largest: (n,) largest distance of each image of this rank.
        k1: among how many nearest images reciprocal ones are looked for.
    """
    # As NumPy rounds in the authors' code: a half goes to the even neighbour.
    half = _reciprocal(neighbours[:, : int(np.around(k1 / 2)) + 1], np.arange(len(images)))
    sizes, turned = half.sum(1), half.T.tocsr()
    parts = [sparse.csr_array((0, len(images)), dtype=np.float32)]
    for first in range(0, len(images.places), _SPARSE_ROWS):
        own = _reciprocal(neighbours[:, : k1 + 1], images.places[first : first + _SPARSE_ROWS])
        common = own.multiply(own @ turned).tocoo()
        # A neighbour's own half-size set joins if more than two thirds of it are in the image's set.
        joins = 3 * common.data > 2 * sizes[common.col]
        joining = sparse.csr_array((common.data[joins], (common.row[joins], common.col[joins])), shape=own.shape)
        parts.append((own + joining @ half).tocsr())
    expanded = sparse.vstack(parts, format="csr")
    expanded.sort_indices()
    rows = np.repeat(np.arange(expanded.shape[0]), np.diff(expanded.indptr))
    weights = np.exp(-_of_pairs(images, rows, expanded.indices) / largest[rows])
    sums = np.bincount(rows, weights, minlength=expanded.shape[0])
    expanded.data = (weights / sums[rows]).astype(np.float32)
    return expanded


def averaged(images: Images, own: sparse.csr_array, neighbours: np.ndarray, k2: int) -> sparse.csr_array:
    """(n, N) means of the encodings of each image's k2 nearest ones, wherever these are; collective."""
    nearest_ones = neighbours[images.places, :k2]
    needed, all_places = np.unique(nearest_ones), images.division.gather(images.places, images.query.device)
    rows, places = [sparse.csr_array((0, len(images)), dtype=np.float32)], [needed[:0]]
    for chosen, block in row_rounds(images.division, own, images.query.device):
        held = np.isin(all_places[chosen], needed)
        rows.append(block if held.all() else block[held])
        places.append(all_places[chosen][held])
    order = np.argsort(np.concatenate(places))
    columns = order[np.searchsorted(needed, nearest_ones.ravel())]
    own_rows, count = nearest_ones.shape
    shares = np.full(nearest_ones.size, 1 / count, dtype=np.float32)
    means = sparse.csr_array((shares, columns, np.arange(own_rows + 1) * count), shape=(own_rows, len(needed)))
    return means @ sparse.vstack(rows, format="csr")


def row_rounds(
    division: Division, own: sparse.csr_array, device: torch.device
) -> Iterator[tuple[np.ndarray, sparse.csr_array]]:
    """The rows of all ranks' matrices, some at a time; collective.

    Args:
        division: of the rows.
        own: (n, N) float32 of this rank's rows.
        device: whose tensors travel.

    Yields:
        (which rows, ascending, those rows), the same on all ranks.
    """
    if division.group is None:
        yield np.arange(len(division)), own
        return
    # SciPy's indices are of a type that depends on what a rank has.
    lengths = division.gather(np.diff(own.indptr).astype(np.int64), device)
    each = max(1, _SPARSE_ROWS // len(division.sizes))
    for first in range(0, max(division.sizes), each):
        starts = [division.rows_of(rank) for rank in range(len(division.sizes))]
        chosen = [np.arange(x.start + first, min(x.start + first + each, x.stop)) for x in starts]
        entries = [int(lengths[rows].sum()) for rows in chosen]
        last = own.indptr[min(first, own.shape[0])], own.indptr[min(first + each, own.shape[0])]
        sent = [torch.from_numpy(x[slice(*last)]).to(device) for x in (own.indices.astype(np.int32), own.data)]
        indices, data = (x.cpu().numpy() for x in gather_parts(division.group, sent, [entries] * 2, 0))
        rows = np.concatenate(chosen)
        begin = np.concatenate([[0], np.cumsum(lengths[rows])])
        yield rows, sparse.csr_array((data, indices, begin), shape=(len(rows), own.shape[1]))


def _reciprocal(neighbours: np.ndarray, places: np.ndarray) -> sparse.csr_array:
    """(n, N) with 1 where an image at one of n places and another of all are neighbours of each other."""
    own = neighbours[places]
    mutual = np.empty(own.shape, dtype=bool)
    for first in range(0, len(own), _SPARSE_ROWS):
        last = slice(first, first + _SPARSE_ROWS)
        mutual[last] = (neighbours[own[last]] == places[last, None, None]).any(2)
    begin = np.concatenate([[0], np.cumsum(mutual.sum(1))])
    shape = len(own), len(neighbours)
    return sparse.csr_array((np.ones(begin[-1], np.float32), own[mutual], begin), shape=shape)


def _of_pairs(images: Images, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(p,) distances of this rank's images, the queries first, and images at any places; collective."""
    found = np.empty(len(rows))
    begin = [0, len(images.shares[0].places)]
    for number, places, distances in images.compared():
        of_share = slice(*np.searchsorted(rows, [begin[number], begin[number] + len(distances.query)]))
        wanted = torch.from_numpy(others[of_share].astype(np.int64)).to(places.device)
        at = torch.searchsorted(places, wanted).clamp(max=len(places) - 1)
        held = places[at] == wanted
        own = torch.from_numpy(rows[of_share] - begin[number]).to(places.device)
        found[of_share][held.cpu().numpy()] = distances.exact(own[held], at[held]).cpu().numpy()
    return found
