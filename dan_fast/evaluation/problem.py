"""What every ranking is given, checked: features, labels and how they are compared."""

from collections.abc import Sequence
from numbers import Integral
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.evaluation.distances import Metric
from dan_fast.evaluation.pairs import Labels

ArrayLike: TypeAlias = Tensor | np.ndarray | Sequence
AveragePrecision: TypeAlias = Literal["standard", "trapezoid"]

BLOCK_BYTES = 64 * 2**20


class RankingProblem(NamedTuple):
    """Queries and a gallery that fit each other, and how they are to be compared.

    Attributes:
        query: (Q, d) features, all of them on every rank.
        gallery: (G, d) features of the same dtype and device; with a group those of this rank's images, maybe none.
        labels: of the queries and of these images.
        metric: of the distances.
        block_bytes: that may be allocated at a time.
        group: of the ranks over which the gallery is divided; None where one rank has all of it.
    """

    query: Tensor
    gallery: Tensor
    labels: Labels
    metric: Metric
    block_bytes: int
    group: ProcessGroup | None = None

    def check_squares(self, query_squares: np.ndarray, gallery_squares: np.ndarray) -> None:
        """Find NaN and Inf by the squared norms, without a copy of the features; a ValueError names what has them."""
        for name, features, squares in (
            ("query_features", self.query, query_squares),
            ("gallery_features", self.gallery, gallery_squares),
        ):
            # A squared Euclidean distance adds up four terms of the size of a squared norm at most.
            with np.errstate(over="ignore"):
                broken = np.flatnonzero(~np.isfinite(4 * squares))
            if len(broken) and not bool(torch.isfinite(features[broken[0]]).all()):
                raise _not_finite(name)
            if len(broken):
                raise ValueError(
                    f"{name} holds numbers whose squares overflow float64; divide the features by a constant."
                )


def checked_problem(
    features: tuple[ArrayLike, ArrayLike],
    labels: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike],
    metric: Metric,
    block_bytes: int,
    group: ProcessGroup | None,
) -> RankingProblem:
    """The problem of these arguments, or a ValueError naming the one that does not fit.

    Whether features are finite is left to :meth:`RankingProblem.check_squares`, as their norms are needed anyway.

    Args:
        features: of the queries and of the gallery.
        labels: query_ids, gallery_ids, query_cams and gallery_cams.
        metric, block_bytes, group: as of :class:`RankingProblem`.
    """
    query, gallery = check_shapes(*features, group is not None)
    check_metric(metric)
    checked = check_labels(*labels, len(query), len(gallery))
    check_block_bytes(block_bytes)
    return RankingProblem(query, gallery, checked, metric, block_bytes, group)


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
    query, gallery = as_tensor(query_features, "query_features"), as_tensor(gallery_features, "gallery_features")
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
        tensor = as_tensor(value, name)
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


def check_scoring(max_rank: int, ap: AveragePrecision) -> None:
    """Raise ValueError for a figure that is not defined."""
    check_whole("max_rank", max_rank)
    if ap not in ("standard", "trapezoid"):
        raise ValueError(f"ap is {ap!r}; it must be 'standard' or 'trapezoid'.")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError for what is no whole number or too small."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {least}.")


def check_block_bytes(block_bytes: int) -> None:
    """Raise ValueError for a budget that holds nothing."""
    if block_bytes < 1:
        raise ValueError(f"block_bytes is {block_bytes}; it must be at least 1.")


def as_tensor(value: ArrayLike, name: str) -> Tensor:
    """The numbers of an argument without their graph, or a ValueError naming what is missing, complex or no tensor."""
    if value is None:
        unknown = "; of unknown cameras give one number for the queries and another for the gallery"
        raise ValueError(f"{name} is missing; ranking needs it{unknown if name.endswith('_cams') else ''}.")
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(_native(value))
    except RuntimeError as error:
        raise ValueError(f"{name} is a list that NumPy cannot read ({error}); torch.stack its tensors.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is no array of numbers; where it holds names, number them alike for queries and gallery."
        ) from error
    if tensor.is_complex():
        raise ValueError(f"{name} is complex; it must hold real numbers.")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{name} is sparse or has no numbers (meta); it must be a dense tensor.")
    return tensor.resolve_neg()


def _native(value: ArrayLike) -> np.ndarray:
    """An array that PyTorch can take: other machines' files have other bytes first, and it has no long double."""
    array = np.ascontiguousarray(value)
    if any(stride < 0 for stride in array.strides):  # along one row or column that counts as contiguous
        array = array.copy()
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _not_finite(name: str) -> ValueError:
    return ValueError(f"{name} holds NaN or Inf; the embedding that made it has diverged or is broken.")
