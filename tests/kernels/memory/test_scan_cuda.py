"""The CUDA scan without a GPU: the kernels' bodies run on host threads, all blocks of the grid at once."""

import ctypes
from functools import partial

import pytest
import torch
from torch import Tensor

from dan_fast.functional.memory.scan import MemoryScan
from dan_fast.functional.memory.scan_types import Slots
from tests.support.scan_problems import (
    PROBLEMS,
    Found,
    Problem,
    assert_faults_change_nothing,
    assert_right,
    by_operators,
    in_dtype,
)
from tests.support.toolchain import Guarded, needs_compiler

pytestmark = [pytest.mark.compile, needs_compiler]
SOURCE = "memory/scan_on_host.cpp"

# Blocks and threads: one warp; blocks that must wait for each other; more slots than threads in most problems.
ONE_WARP, MANY_BLOCKS, STRIDED = (1, 32), (3, 64), (2, 32)
GRIDS = dict.fromkeys(("blocks", "ties over blocks"), MANY_BLOCKS)
GRIDS |= dict.fromkeys(
    ("more slots than threads", "half full", "full", "ties", "close keys", "nothing to retrieve from"), STRIDED
)


def on_host(library: ctypes.CDLL, grid: tuple[int, int], arguments: list, grad_loss: float = 1.0) -> Found:
    """Every output has guarded rubbish in it before."""
    scores, unlabeled_scores, gram, gates, labels, ids, labeled, unlabeled, *decays, scalar_keys = arguments
    guarded = Guarded()
    outputs, gradients = guarded.like(MemoryScan.fake(*arguments)), guarded.like(arguments[:4])
    # The kernels may not read above the diagonal.
    gram = gram.masked_fill(torch.ones_like(gram).triu(1) > 0, torch.nan)
    inputs = [scores, unlabeled_scores, gram, gates, labels, ids, *labeled, *unlabeled]
    upstream = torch.full_like(outputs[0], grad_loss)
    arrays = [*(x.contiguous() for x in inputs), *outputs, upstream, *gradients]
    pointers = (ctypes.c_void_p * len(arrays))(*(x.data_ptr() for x in arrays))
    sizes = (ctypes.c_int64 * 5)(len(labels), len(ids), len(labeled.labels), len(unlabeled.labels), scalar_keys)
    suffix = "double" if scores.dtype == torch.float64 else "float"
    for name in ("forward", "backward"):
        getattr(library, f"scan_{name}_{suffix}")(sizes, (ctypes.c_double * 2)(*decays), pointers, *grid)
    guarded.assert_untouched()
    return Found.of(outputs, gradients)


@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients(library: ctypes.CDLL, name: str):
    assert_right(partial(on_host, library, GRIDS.get(name, ONE_WARP)), Problem(**PROBLEMS[name]).arguments(), name)


@pytest.mark.parametrize("name", ["some full", "blocks", "many keys", "half full"])
def test_float32(library: ctypes.CDLL, name: str):
    arguments = in_dtype(Problem(**PROBLEMS[name]).arguments(), torch.float32)
    assert_right(partial(on_host, library, GRIDS.get(name, ONE_WARP)), arguments, name)


def test_faults_change_nothing(library: ctypes.CDLL):
    assert_faults_change_nothing(partial(on_host, library, STRIDED), torch.float64)


def test_the_same_bits_every_time(library: ctypes.CDLL):
    arguments = Problem(**PROBLEMS["blocks"]).arguments()
    assert all(map(torch.equal, *(on_host(library, MANY_BLOCKS, arguments).flat for _ in range(2))))


def test_the_grid_changes_rounding_only(library: ctypes.CDLL):
    arguments = Problem((130, 140), (3, 4), seed=24).arguments()
    first, *others = (on_host(library, grid, arguments).flat for grid in ((1, 32), (5, 32), (2, 96)))
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-12, atol=1e-12)


def on_gpu(arguments: list) -> list:
    def move(x: object) -> object:
        return x.cuda() if isinstance(x, Tensor) else Slots(*map(Tensor.cuda, x)) if isinstance(x, Slots) else x

    return [move(x) for x in arguments]


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [(20, 30), (1000, 700), (9000, 5500), (400_000, 3)])
def test_the_gpu_does_what_the_host_does(slots: tuple[int, int]):
    arguments = Problem(slots, (5, 6), seed=25, fill=(1, 1), classes=20, d=16).arguments()
    first, again, on_cpu = (by_operators(x).flat for x in (on_gpu(arguments), on_gpu(arguments), arguments))
    for a, b, c in zip(first, again, on_cpu, strict=True):
        assert torch.equal(a, b), "two runs differ"
        torch.testing.assert_close(a.cpu(), c, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
def test_a_cuda_graph_captures_it():
    arguments = on_gpu(Problem((900, 550), (4, 5), seed=26).arguments())
    arguments[6:8] = map(list, arguments[6:8])
    expected_loss = torch.ops.dan_fast.memory_scan(*arguments)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = torch.ops.dan_fast.memory_scan(*arguments)
    for _ in range(2):
        outputs[0].zero_()
        graph.replay()
        assert torch.equal(outputs[0], expected_loss)
