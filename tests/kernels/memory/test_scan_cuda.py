"""The CUDA scan without a GPU: the kernels' bodies run on host threads, all blocks of the grid at once."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dan_fast import _extension
from dan_fast.functional.memory import scan_torch
from dan_fast.functional.memory.scan_types import ScanInput, Slots

SOURCE = Path(__file__).resolve().parent / "scan_on_host.cpp"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-pthread"]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler on this machine")

# Blocks and threads: one warp; blocks that must wait for each other; more slots than threads in most problems.
ONE_WARP, MANY_BLOCKS, STRIDED = (1, 32), (3, 64), (2, 32)


def build(folder: Path, name: str, *flags: str) -> Path:
    target = folder / name
    subprocess.run([COMPILER, *FLAGS, *flags, SOURCE, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("host"), "scan.so", "-O1", "-shared", "-fPIC")))


class Problem(NamedTuple):
    """The arguments of `scan` but the two memories and the scalars, those, and those."""

    tensors: tuple[Tensor, ...]
    memories: tuple[Slots, Slots]
    settings: tuple[float, float, bool]


def problem(
    slots: tuple[int, int],
    batch: tuple[int, int],
    seed: int = 0,
    fill: tuple[float, float] = (0.7, 0.7),
    classes: int = 3,
    dim: int = 4,
    kind: str = "random",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def vectors(count: int) -> Tensor:
        values = torch.randn(count, dim, generator=generator, dtype=torch.float64)
        chosen = torch.randint(0, 2, (count, 1), generator=generator)
        match kind:
            case "repeated":
                return torch.where(chosen == 0, torch.ones(dim), torch.arange(dim) - 1.0).double()
            case "zero":
                return values * chosen
            case "close":  # cosines that differ late: the selection needs many digits
                return 1 + 1e-4 * values
        return values

    keys = vectors(sum(batch)).to(dtype)
    memories = []
    features = []
    for count, share in zip(slots, fill, strict=True):
        occupied = torch.rand(count, generator=generator) < share
        rows = (vectors(count) * occupied[:, None]).to(dtype)
        labels = torch.randint(0, classes, (count,), generator=generator)
        features.append(rows)
        memories.append(
            Slots(
                square_norms=rows.square().sum(1),
                usage=(torch.randint(0, 3, (count,), generator=generator) * occupied).to(dtype),
                evaluation=torch.rand(count, generator=generator, dtype=torch.float64).to(dtype) / count,
                labels=torch.where(occupied, labels, -1),
                sample_ids=torch.where(occupied, torch.arange(count), -1),
                least_used=torch.randint(0, count, (), generator=generator),
            )
        )
    gates = torch.tensor([0.3, -0.4, 0.6], dtype=dtype)
    labels = torch.randint(0, classes, (batch[0],), generator=generator)
    ids = torch.randint(0, 99, (batch[1],), generator=generator)
    scores, unlabeled_scores = keys @ features[0].mT, keys[batch[0] :] @ features[1].mT
    tensors = (scores, unlabeled_scores, keys @ keys.mT, gates, labels, ids)
    return Problem(tensors, (memories[0], memories[1]), (0.97, 0.9, dim == 1))


def poisoned(*shape: int, like: Tensor) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype)


class OnHost:
    """The outputs of the kernels and the gradients, as `scan_on_host.cpp` takes them."""

    def __init__(self, library: ctypes.CDLL, p: Problem, grid: tuple[int, int], grad_loss: float = 1.7) -> None:
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


def expected(p: Problem, grad_loss: float = 1.7):
    tensors = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in p.tensors]
    result = scan_torch.scan(ScanInput(*tensors, *p.memories, *p.settings))
    grads = torch.autograd.grad(result.loss * grad_loss, tensors[:4], allow_unused=True)
    return result, [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=False)]


def compare(library: ctypes.CDLL, p: Problem, grid: tuple[int, int]) -> OnHost:
    """Values and gradients against the PyTorch form, a 1e-10 or, in float32, what its rounding leaves."""
    result, grads = expected(p)
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
    "scalar keys": (problem((20, 30), (4, 5), seed=9, dim=1), ONE_WARP),
    "scalar keys, some zero": (problem((20, 30), (4, 5), seed=10, dim=1, kind="zero"), ONE_WARP),
    "ties": (problem((40, 300), (3, 5), seed=11, fill=(1, 1), kind="repeated"), STRIDED),
    "ties over blocks": (problem((40, 180), (2, 4), seed=12, fill=(1, 1), kind="repeated", dim=2), MANY_BLOCKS),
    "zero keys": (problem((20, 30), (4, 6), seed=13, kind="zero"), ONE_WARP),
    "close keys": (problem((20, 90), (3, 6), seed=14, fill=(1, 1), kind="close"), STRIDED),
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
    compare(library, Problem(tuple(map(narrow, tensors)), tuple(memories), settings), grid)


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


def compare_fault(library: ctypes.CDLL, p: Problem) -> OnHost:
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


def run_under(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer cannot place its shadow memory under some settings of address randomisation.
    unrandomised = [shutil.which("setarch"), os.uname().machine, "-R"] if shutil.which("setarch") else []
    environment = os.environ | {
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0 exitcode=67",
        "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
    }
    # setarch may be forbidden in a container, where the program then runs as it is.
    if unrandomised and subprocess.run([*unrandomised, "true"], capture_output=True).returncode != 0:
        unrandomised = []
    return subprocess.run([*unrandomised, program, *arguments], capture_output=True, text=True, env=environment)


THREAD = ("-O0", "-g", "-fsanitize=thread", "-DSCAN_ON_HOST_MAIN=double")
ADDRESS = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSCAN_ON_HOST_MAIN=float")


def needs(*flags: str) -> None:
    """Skips where the compiler comes without this sanitizer's library."""
    probe = subprocess.run(
        [COMPILER, "-x", "c++", *flags, "-", "-o", os.devnull], input="int main() {}", capture_output=True, text=True
    )
    if probe.returncode != 0:
        pytest.skip(f"the compiler has no {flags[2]}")


@pytest.fixture(scope="module")
def watched_for_races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs(*THREAD)
    return build(tmp_path_factory.mktemp("thread"), "scan", *THREAD)


@pytest.fixture(scope="module")
def watched_for_bounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs(*ADDRESS)
    return build(tmp_path_factory.mktemp("address"), "scan", *ADDRESS)


def test_no_data_race(watched_for_races: Path):
    done = run_under(watched_for_races, "2", "64")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[:3000]


def test_a_barrier_that_orders_nothing_is_reported(watched_for_races: Path):
    done = run_under(watched_for_races, "2", "32", "racy")
    assert done.returncode == 66 and "data race" in done.stderr


def test_no_access_out_of_bounds_and_no_undefined_behaviour(watched_for_bounds: Path):
    done = run_under(watched_for_bounds, "2", "64")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_an_access_out_of_bounds_is_reported(watched_for_bounds: Path):
    done = run_under(watched_for_bounds, "1", "32", "short")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.skipif(not _extension.has_cuda_kernels(), reason="the extension was built without CUDA")
@pytest.mark.parametrize("name", ["memory_scan", "memory_scan_backward"])
def test_the_operators_are_registered_for_cuda(name: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dan_fast::{name}", "CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("slots", [(20, 30), (1000, 700), (9000, 5500), (400_000, 3)])
def test_the_gpu_does_what_the_host_does(slots: tuple[int, int]):
    p = problem(slots, (5, 6), seed=25, fill=(1, 1), classes=20, dim=16)

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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
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
