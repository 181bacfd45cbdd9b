"""The CUDA scan without a GPU: the kernels' bodies run on host threads, all blocks of the grid at once."""

import ctypes
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dan_fast.functional.memory.scan_types import Slots
from tests.support.scan_problems import Problem, in_pytorch
from tests.support.toolchain import library_on_host, needs_compiler, needs_cuda_kernels

pytestmark = [pytest.mark.compile, needs_compiler]

# Blocks and threads: one warp; blocks that must wait for each other; more slots than threads in most problems.
ONE_WARP, MANY_BLOCKS, STRIDED = (1, 32), (3, 64), (2, 32)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library_on_host("memory/scan_on_host.cpp", tmp_path_factory.mktemp("host"))


class Arguments(NamedTuple):
    """The arguments of `scan` but the two memories and the scalars, those, and those."""

    tensors: tuple[Tensor, ...]
    memories: tuple[Slots, Slots]
    settings: tuple[float, float, bool]


def problem(slots: tuple[int, int], batch: tuple[int, int], **options: Any) -> Arguments:
    arguments = Problem(slots, batch, **options).arguments()
    return Arguments(tuple(arguments[:6]), tuple(arguments[6:8]), tuple(arguments[8:]))


def poisoned(*shape: int, like: Tensor) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype)


class OnHost:
    """The outputs of the kernels and the gradients, as `scan_on_host.cpp` takes them."""

    def __init__(self, library: ctypes.CDLL, p: Arguments, grid: tuple[int, int], grad_loss: float = 1.7) -> None:
        scores, unlabeled_scores, gram, gates, labels, ids = p.tensors
        # The kernels may not read above the diagonal.
        gram = gram.masked_fill(torch.ones_like(gram).triu(1) > 0, torch.nan)
        inputs = [scores, unlabeled_scores, gram, gates, labels, ids, *p.memories[0], *p.memories[1]]
        steps, slots = (labels.numel(), ids.numel()), [m.labels.numel() for m in p.memories]

        self.loss = poisoned(like=scores)
        self.pseudo_labels, self.fault = torch.full_like(ids, -7), torch.tensor(-7, dtype=torch.int32)
        self.after, self.records = [], []
        for count, size in zip(steps, slots, strict=True):
            floats = [poisoned(size, like=scores) for _ in range(4)] + [poisoned(count, size, like=scores)]
            integers = [torch.full((size,), -7) for _ in range(2)] + [torch.tensor(-7)]
            self.after.append([*floats, *integers])
            records = [poisoned(count, size, like=scores) for _ in range(4)]
            self.records.append([*records, torch.full((count, size), 77, dtype=torch.uint8)])
        self.retrieval = [poisoned(steps[1], width, like=scores) for width in (slots[0], 4, 2)]
        self.gradients = [torch.full_like(x, torch.nan) for x in (scores, unlabeled_scores, gram, gates)]
        upstream = torch.tensor(grad_loss, dtype=scores.dtype)
        self.outputs = [self.loss, self.pseudo_labels, self.fault, *self.after[0], *self.after[1]]
        self.outputs += [*self.records[0], *self.records[1], *self.retrieval]

        arrays = [x.contiguous() for x in inputs] + self.outputs + [upstream] + self.gradients
        pointers = (ctypes.c_void_p * len(arrays))(*(x.data_ptr() for x in arrays))
        sizes = (ctypes.c_int64 * 5)(*steps, *slots, p.settings[2])
        decays = (ctypes.c_double * 2)(*p.settings[:2])
        suffix = "double" if scores.dtype == torch.float64 else "float"
        for name in ("forward", "backward"):
            getattr(library, f"scan_{name}_{suffix}")(sizes, decays, pointers, *grid)


def compare(library: ctypes.CDLL, p: Arguments, grid: tuple[int, int]) -> OnHost:
    """Values and gradients against the PyTorch form, a 1e-10 or, in float32, what its rounding leaves."""
    result, grads = in_pytorch([*p.tensors, *p.memories, *p.settings], 1.7)
    actual = OnHost(library, p, grid)
    exact = actual.loss.dtype == torch.float64
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 2e-3, "atol": 2e-4}
    assert actual.fault == result.fault
    torch.testing.assert_close(actual.pseudo_labels, result.pseudo_labels)
    torch.testing.assert_close(actual.loss, result.loss.detach(), equal_nan=True, **tolerance)
    for after, wanted in zip(actual.after, (result.labeled, result.unlabeled), strict=True):
        for name, got, value in zip(wanted._fields, after, wanted, strict=True):
            torch.testing.assert_close(got, value, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    # A key or a slot of length 0 counts as one of length 1e-12 and multiplies rounding errors by 1e12.
    lengths = p.tensors[2].diagonal()[:, None].clamp(min=1e-24).sqrt()
    norms = [memory.square_norms.clamp(min=1e-24).sqrt() for memory in p.memories]
    unlabeled_lengths = lengths[p.tensors[4].numel() :]
    noise = [1e-14 / x for x in (lengths * norms[0], unlabeled_lengths * norms[1], lengths * lengths.mT)] + [0.0]
    names = ("scores", "unlabeled_scores", "gram", "gates")
    for name, got, value, extra in zip(names, actual.gradients, grads, noise, strict=True):
        excess = (got - value).abs() - tolerance["atol"] - tolerance["rtol"] * value.abs() - extra
        assert (excess <= 0).all(), f"gradient of {name} off by {excess.max().item()}"
    assert not any(x.isnan().any() for x in actual.outputs[1:] if x.is_floating_point()), "something was not written"
    return actual


PROBLEMS = {
    "one warp": (problem((20, 30), (3, 4)), ONE_WARP),
    "blocks": (problem((150, 180), (3, 4), seed=1), MANY_BLOCKS),
    "more slots than threads": (problem((150, 333), (2, 5), seed=2), STRIDED),
    "many keys": (problem((40, 25), (20, 19), seed=3), ONE_WARP),
    "empty": (problem((9, 8), (3, 4), seed=4, fill=(0, 0)), ONE_WARP),
    "half full": (problem((70, 70), (4, 4), seed=5, fill=(0.5, 0.5)), STRIDED),
    "full": (problem((33, 65), (3, 5), seed=6, fill=(1, 1)), STRIDED),
    "fewer slots than samples": (problem((3, 2), (6, 7), seed=7), ONE_WARP),
    "one slot": (problem((1, 1), (3, 3), seed=8), ONE_WARP),
    "scalar keys": (problem((20, 30), (4, 5), seed=9, d=1), ONE_WARP),
    "scalar keys, some zero": (problem((20, 30), (4, 5), seed=10, d=1, kind="zero"), ONE_WARP),
    "ties": (problem((40, 300), (3, 5), seed=11, fill=(1, 1), kind="repeated"), STRIDED),
    "ties over blocks": (problem((40, 180), (2, 4), seed=12, fill=(1, 1), kind="repeated", d=2), MANY_BLOCKS),
    "zero keys": (problem((20, 30), (4, 6), seed=13, kind="zero"), ONE_WARP),
    "close keys": (problem((20, 90), (3, 6), seed=14, fill=(1, 1), kind="closer"), STRIDED),
    "one class": (problem((20, 30), (3, 4), seed=15, classes=1), ONE_WARP),
    "no labelled sample": (problem((20, 30), (0, 4), seed=16), ONE_WARP),
    "no unlabelled sample": (problem((20, 30), (4, 0), seed=17), ONE_WARP),
    "no sample": (problem((20, 30), (0, 0), seed=18), ONE_WARP),
    "skipped": (problem((9, 30), (0, 4), seed=19, fill=(0, 1)), STRIDED),
    "only M' empty": (problem((20, 30), (2, 4), seed=20, fill=(1, 0)), ONE_WARP),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients(library: ctypes.CDLL, name: str):
    actual = compare(library, *PROBLEMS[name])
    if name in ("blocks", "ties", "ties over blocks", "close keys", "more slots than threads", "full"):
        assert (actual.retrieval[2][:, 0] > 0).any(), "no sample was false: the selection was not used"


def test_n_larger_than_the_slots_of_others(library: ctypes.CDLL):
    p = problem((20, 40), (2, 4), seed=21, fill=(1, 1), classes=1)
    few = torch.arange(40) % 9 == 4
    p.memories[1].labels[few] = 5
    actual = compare(library, p, ONE_WARP)
    assert (actual.retrieval[2][:, 0] > 0).any()


@pytest.mark.parametrize("name", ["one warp", "blocks", "many keys", "half full"])
def test_float32(library: ctypes.CDLL, name: str):
    (tensors, memories, settings), grid = PROBLEMS[name]

    def narrow(x: Tensor) -> Tensor:
        return x.float() if x.is_floating_point() else x

    memories = [Slots(*map(narrow, memory)) for memory in memories]
    compare(library, Arguments(tuple(map(narrow, tensors)), tuple(memories), settings), grid)


@pytest.mark.parametrize("bit", range(9))
def test_faults(library: ctypes.CDLL, bit: int):
    p = problem((40, 37), (2, 3), seed=22)
    _, _, gram, gates, labels, ids = p.tensors
    match bit:
        case 0:
            gram[1, 1] = torch.nan
        case 1:
            gram[4, 4] = torch.inf
        case 2:
            labels[1] = -1
        case 3:
            ids[2] = -3
        case 4 | 5 | 6:
            gates[bit - 4] = -torch.inf
        case 7:
            p.memories[0].least_used.fill_(40)
        case 8:
            p.memories[1].least_used.fill_(-1)
    actual = compare_fault(library, p)
    assert actual.fault == 1 << bit


def compare_fault(library: ctypes.CDLL, p: Arguments) -> OnHost:
    """Nothing written, loss NaN; unlike the PyTorch form's, the gradients are 0 whatever the values."""
    actual = OnHost(library, p, STRIDED)
    assert actual.loss.isnan() and (actual.pseudo_labels == -1).all()
    for after, before in zip(actual.after, p.memories, strict=True):
        norms, usage, evaluation, kept, held, *integers = after
        assert all(torch.equal(a, b) for a, b in zip((norms, usage, evaluation, *integers), before, strict=True))
        assert (kept == 1).all() and (held == 0).all()
    assert all((x == 0).all() for x in (*actual.gradients, *actual.records[0], *actual.records[1], *actual.retrieval))
    return actual


def test_several_faults_are_all_told(library: ctypes.CDLL):
    p = problem((10, 7), (2, 3), seed=23)
    p.tensors[4][0], p.tensors[3][2] = -1, torch.nan
    assert compare_fault(library, p).fault == 4 + 64


def test_the_same_bits_every_time(library: ctypes.CDLL):
    p = PROBLEMS["blocks"][0]
    first, second = (OnHost(library, p, MANY_BLOCKS) for _ in range(2))
    for a, b in zip(first.outputs + first.gradients, second.outputs + second.gradients, strict=True):
        assert torch.equal(a, b)


def test_the_grid_changes_rounding_only(library: ctypes.CDLL):
    p = problem((130, 140), (3, 4), seed=24)
    runs = [OnHost(library, p, grid) for grid in ((1, 32), (5, 32), (2, 96))]
    for other in runs[1:]:
        for a, b in zip(runs[0].outputs + runs[0].gradients, other.outputs + other.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@needs_cuda_kernels
@pytest.mark.parametrize("name", ["memory_scan", "memory_scan_backward"])
def test_the_operators_are_registered_for_cuda(name: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dan_fast::{name}", "CUDA")


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [(20, 30), (1000, 700), (9000, 5500), (400_000, 3)])
def test_the_gpu_does_what_the_host_does(slots: tuple[int, int]):
    p = problem(slots, (5, 6), seed=25, fill=(1, 1), classes=20, d=16)

    def run(device: str) -> list[Tensor]:
        tensors = [x.to(device) for x in p.tensors]
        arguments = (*tensors, *([x.to(device) for x in memory] for memory in p.memories), *p.settings)
        outputs = torch.ops.dan_fast.memory_scan(*arguments)
        upstream = torch.ones((), dtype=torch.float64, device=device)
        return [*outputs, *torch.ops.dan_fast.memory_scan_backward(upstream, *arguments, outputs)]

    first, again, on_cpu = run("cuda"), run("cuda"), run("cpu")
    for a, b, c in zip(first, again, on_cpu, strict=True):
        assert torch.equal(a, b), "two runs differ"
        torch.testing.assert_close(a.cpu(), c, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
def test_a_cuda_graph_captures_it():
    p = problem((900, 550), (4, 5), seed=26)
    tensors = [x.cuda() for x in p.tensors]
    arguments = (*tensors, *([x.cuda() for x in memory] for memory in p.memories), *p.settings)
    expected_loss = torch.ops.dan_fast.memory_scan(*arguments)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = torch.ops.dan_fast.memory_scan(*arguments)
    for _ in range(2):
        outputs[0].zero_()
        graph.replay()
        assert torch.equal(outputs[0], expected_loss)
