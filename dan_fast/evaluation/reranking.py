"""k-reciprocal re-ranking in bounded memory (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal
Encoding", CVPR 2017).

An image is encoded by its reciprocal neighbours: its nearest images that have it among their own nearest ones. The
final distance mixes the Jaccard distance of two such encodings with the original one. The authors' code keeps several
matrices of all images by all images; here the nearest neighbours of each image are kept, and the encodings as sparse
rows.
"""

from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dan_fast.core.defaults import default_cpu
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.evaluation.counting_torch import ranks_of_part, whole_gallery
from dan_fast.evaluation.distances import ENTRY_BYTES, Metric, PartDistances, on_grid
from dan_fast.evaluation.divided import Division, refused_by_all
from dan_fast.evaluation.pairs import Labels
from dan_fast.evaluation.problem import (
    BLOCK_BYTES,
    ArrayLike,
    AveragePrecision,
    RankingProblem,
    check_scoring,
    check_whole,
    checked_problem,
)
from dan_fast.evaluation.ranking import RankingResult, score
from dan_fast.evaluation.reciprocal import Images, averaged, encodings, nearest, row_rounds

# Its name in protocols.
RERANKED = "k-reciprocal re-ranking"
# Below any distance that is not 0.
_SMALLEST = 1e-300


class Reranking(NamedTuple):
    """Settings of k-reciprocal re-ranking; the defaults are the paper's.

    Attributes:
        k1: nearest neighbours among which reciprocal ones are looked for.
        k2: nearest neighbours over which encodings are averaged.
        weight: lambda, the share of the original distance.
    """

    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    def __str__(self) -> str:
        return f"{RERANKED} (k1 {self.k1}, k2 {self.k2}, lambda {self.weight:g})"


PAPER = Reranking()


@default_cpu()
def evaluate_reranked(
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
    reranking: Reranking = PAPER,
    process_group: ProcessGroup | None = None,
) -> RankingResult:
    """As :func:`dan_fast.evaluation.evaluate_ranking`, by distances after re-ranking.

    The original distances, 1 - cos or squared Euclidean, are divided by the largest one of their query. Encodings are
    float32, as the authors' are, so of distances that should be equal, only those of copies of an image are sure to be.

    With ``process_group`` a rank encodes its own part of the gallery and a share of the queries. It receives the
    features of the other ranks in blocks, twice, and their encodings once. For each image of all ranks it keeps labels,
    norm, nearest images and half-size sets: about 4 (k1 + 1) + 8 (k1 + 2) + 100 bytes, 360 with the paper's settings.

    Raises:
        ValueError: an argument of wrong shape, length or content; `NoMatchError` if no query matches.

    Example:
        >>> import torch
        >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.0, 1.0]])
        >>> evaluate_reranked(query, gallery, [7], [7, 8], [1], [2, 2]).mAP
        1.0
    """
    with refused_by_all(process_group, ValueError, "check its arguments"):
        features, labels = (query_features, gallery_features), (query_ids, gallery_ids, query_cams, gallery_cams)
        problem = checked_problem(features, labels, metric, block_bytes, process_group)
        check_scoring(max_rank, ap)
        check_reranking(reranking)
    distances, whole, division = _reranked(problem, reranking)
    # All images of the largest part at a time, as a query's Jaccard distances come together.
    found = ranks_of_part(distances, whole, block_bytes, ENTRY_BYTES * max(division.sizes), division)
    return score(found, max_rank, ap)


def check_reranking(reranking: Reranking) -> None:
    """Raise TypeError or ValueError for parameters that are none."""
    if not isinstance(reranking, Reranking):
        raise TypeError(f"reranking must be Reranking(k1, k2, weight), got {reranking!r}")
    check_whole("k1", reranking.k1)
    check_whole("k2", reranking.k2)
    if not isinstance(reranking.weight, Real) or not 0 <= reranking.weight <= 1:
        raise ValueError(f"weight is {reranking.weight}; it must lie between 0 and 1.")


def _reranked(problem: RankingProblem, reranking: Reranking) -> "tuple[_Reranked, Labels, Division]":
    """Distances of queries and the part of the gallery, and labels and division of the whole; collective."""
    query, gallery, budget = problem.query, problem.gallery, problem.block_bytes
    division, labels, squares = whole_gallery(problem)
    images = Images(query, gallery, squares, problem.metric, budget, division)
    found = nearest(images, max(reranking.k1 + 1, reranking.k2))
    neighbours = images.gather(*(each.places.to(torch.int32).cpu().numpy() for each in found))
    largest = [np.maximum(each.largest.cpu().numpy(), _SMALLEST) for each in found]
    del found
    own = encodings(images, neighbours, np.concatenate(largest), reranking.k1)
    if reranking.k2 > 1:
        own = averaged(images, own, neighbours, reranking.k2)
    queries, device = images.divisions[0], query.device
    count = len(images.shares[0].places)
    of_queries = sparse.vstack([rows for _, rows in row_rounds(queries, own[:count], device)], format="csr")
    of_gallery = own[count:].tocsc()
    # The largest norm, by which the grid is, may be a query's.
    scale = images.scale.of(slice(0, len(query)), slice(len(query), None))
    original = PartDistances(query, gallery, scale, budget, division.rows.start)
    mixed = _Reranked(original, queries.gather(largest[0], device), of_queries, of_gallery, reranking.weight)
    return mixed, labels, division


class _Reranked:
    """The mean of original and Jaccard distances, as `ranks_of_part` takes them.

    Args:
        original: distances of the queries and the part of the gallery.
        largest: (Q,) largest original distance of each query.
        of_queries: (Q, N) encodings.
        of_gallery: (n, N) encodings of the part.
        weight: lambda, the share of the original distance.
    """

    def __init__(
        self,
        original: PartDistances,
        largest: np.ndarray,
        of_queries: sparse.csr_array,
        of_gallery: sparse.csc_array,
        weight: float,
    ) -> None:
        self.original, self.images, self.columns = original, original.images, max(1, len(original.part))
        self.largest, self.of_queries, self.of_gallery, self.weight = largest, of_queries, of_gallery, weight

    def of_rows(self, rows: slice) -> "_RerankedRows":
        jaccard = np.stack([_jaccard(self.of_queries, q, self.of_gallery) for q in range(rows.start, rows.stop)])
        device, largest = self.original.steps.device, self.largest[rows, None]
        # Where all original distances are 0 they have no share, whatever a product of matrices makes of them.
        weight = np.where(largest > _SMALLEST, self.weight, 0.0)
        mixed = (1 - self.weight) * jaccard, np.where(largest > _SMALLEST, largest, 1.0), weight
        return _RerankedRows(self.original.of_rows(rows), *(torch.from_numpy(x).to(device) for x in mixed))


class _RerankedRows:
    """Those of some queries: (b, n) shares of the Jaccard distances, (b, 1) largest distances and weights."""

    def __init__(self, original: PartDistances, jaccard: Tensor, largest: Tensor, weight: Tensor) -> None:
        self.original, self.jaccard, self.largest, self.weight = original, jaccard, largest, weight
        self.images = original.images
        # Beside the original's, what rounding makes of numbers up to 1.
        self.uncertainty = 1.01 * weight * original.uncertainty / largest + 2.0**-48

    def near(self, columns: slice) -> Tensor:
        distances = on_grid(self.original.near(columns), self.original.steps[:, None])
        return distances / self.largest * self.weight + self.jaccard[:, columns]

    def exact(self, queries: Tensor, places: Tensor) -> Tensor:
        distances = self.original.exact(queries, places) / self.largest[queries, 0] * self.weight[queries, 0]
        return distances + self.jaccard[queries, places - self.images.start]


def _jaccard(of_queries: sparse.csr_array, query: int, of_gallery: sparse.csc_array) -> np.ndarray:
    """(G,) Jaccard distances of a query's encoding and all of the gallery."""
    own = slice(of_queries.indptr[query], of_queries.indptr[query + 1])
    columns, weights = of_queries.indices[own], of_queries.data[own]
    begin = of_gallery.indptr[columns]
    sizes = of_gallery.indptr[columns + 1] - begin
    ends = np.cumsum(sizes)
    entries = np.repeat(begin - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)
    smaller = np.minimum(of_gallery.data[entries], np.repeat(weights, sizes))
    common = np.bincount(of_gallery.indices[entries], smaller, minlength=of_gallery.shape[0])
    return 1 - common / (2 - common)
