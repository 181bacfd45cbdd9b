"""Ranks of true matches as counts: by the compiled module on the CPU, else in PyTorch operations.

The rank of a match is one more than the gallery images before it: nearer, or as near and earlier in the gallery. Only
matches need a rank, so no list is sorted and no matrix of all queries and gallery images is kept.
"""

import functools
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from dan_fast import _extension
from dan_fast._sources import AGAIN
from dan_fast.core.errors import DanFastError
from dan_fast.evaluation import counting_torch
from dan_fast.evaluation.distances import distance_scale
from dan_fast.evaluation.pairs import Labels, Pairs, pairs_in_blocks
from dan_fast.evaluation.problem import RankingProblem

MODULE = Path(_extension.__file__).with_name(f"_ranking{sysconfig.get_config_var('EXT_SUFFIX')}")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Bytes that the kernels and the lists of pairs take for a gallery image of a query's identity, a query and a thread.
_PAIR_BYTES, _QUERY_BYTES, _THREAD_BYTES = 96, 64, 4
_NOT_NUMBERS = "distances holds NaN; every query-gallery pair needs a distance."


@functools.cache
def load() -> ModuleType | str:
    """The compiled module, or one sentence on why there is none."""
    try:
        from dan_fast import _ranking
    except ImportError as error:
        if MODULE.is_file():
            return f"{MODULE} does not load ({error}); {AGAIN}"
        missing = [each for each in _extension.build_info().get("missing", []) if each.startswith("no compiled")]
        not_built = f"the compiled ranking was not built for Python {platform.python_version()}; {AGAIN}"
        return missing[0] if missing else not_built
    try:
        _ranking.isa()
    except RuntimeError as error:  # DAN_FAST_ISA is no set
        raise DanFastError(f"{error}.") from None
    return _ranking


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"dan_fast ranks in PyTorch operations: {reason}", RuntimeWarning, stacklevel=6)


def _kernels_for(tensor: Tensor) -> ModuleType | None:
    if tensor.device.type != "cpu" or tensor.dtype not in _DTYPES or not _extension.enabled():
        return None
    module = load()
    if isinstance(module, str):
        _warn_once(module)
        return None
    return module


def ranks_by_distances(distances: Tensor, labels: Labels, budget: int) -> Iterator[tuple[Pairs, np.ndarray]]:
    """Blocks of queries and the ranks of their matches, ascending within a query.

    Args:
        distances: (Q, G), any real dtype and device.
        labels: identities and cameras.
        budget: bytes that may be allocated at a time.

    Raises:
        ValueError: a distance is NaN.
    """
    module = _kernels_for(distances)
    if module is None:
        rows = max(1, budget // distances[:1].nbytes)
        if any(bool(torch.isnan(block).any()) for block in distances.split(rows)):
            raise ValueError(_NOT_NUMBERS)
        yield from counting_torch.ranks_by_distances(distances, labels, budget)
        return
    matrix, threads = _adjacent(distances), torch.get_num_threads()
    for pairs in pairs_in_blocks(labels, _QUERY_BYTES, _PAIR_BYTES, budget):
        array, dtype = _array(matrix[pairs.rows])
        ranks = module.distances_ranks(array, dtype, *pairs[1:], threads)
        if ranks is None:
            raise ValueError(_NOT_NUMBERS)
        yield pairs, ranks


def ranks_by_features(problem: RankingProblem) -> Iterator[tuple[Pairs, np.ndarray]]:
    """As :func:`ranks_by_distances`, of features; collective where there is a group.

    The kernels compare almost all pairs by a product in float32 with an error bound, and the few it leaves undecided by
    their exact distances: the ranks are those of float64.
    """
    module = _kernels_for(problem.query)
    if module is None or problem.group is not None:
        yield from counting_torch.ranks_by_features(problem)
        return
    query, gallery, threads = _adjacent(problem.query), _adjacent(problem.gallery), torch.get_num_threads()
    array, dtype = _array(gallery)
    squares = module.square_norms(*_array(query), threads), module.square_norms(array, dtype, threads)
    problem.check_squares(*squares)
    scale = distance_scale(*squares, problem.metric)
    query_bytes = _QUERY_BYTES + (8 if query.dtype == torch.float64 else 4) * (query.shape[1] + 32)
    pair_bytes = _PAIR_BYTES + _THREAD_BYTES * threads
    for pairs in pairs_in_blocks(problem.labels, query_bytes, pair_bytes, problem.block_bytes):
        ranks = module.features_ranks(
            _array(query[pairs.rows])[0],
            array,
            dtype,
            scale.cosine,
            scale.query_norms[pairs.rows],
            scale.gallery_norms,
            scale.steps[pairs.rows],
            float(scale.gallery_norms.max()),
            scale.scale,
            *pairs[1:],
            threads,
        )
        yield pairs, ranks


def _adjacent(matrix: Tensor) -> Tensor:
    """The matrix itself where its layout suits the kernels, else a copy."""
    rows, columns = matrix.shape
    adjacent = matrix.stride(1) == 1 or columns == 1
    return matrix if adjacent and (matrix.stride(0) >= columns or rows == 1) else matrix.contiguous()


def _array(matrix: Tensor) -> tuple[np.ndarray, str]:
    """The same memory as an array, and the name of its dtype; NumPy has no bfloat16."""
    name = str(matrix.dtype).removeprefix("torch.")
    return (matrix.view(torch.uint16) if matrix.dtype == torch.bfloat16 else matrix).numpy(), name
