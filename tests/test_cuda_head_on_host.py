"""The CUDA kernels of the attention head without a GPU: their bodies run on host threads."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dan_fast import _extension
from tests.head_problems import (
    Case,
    Gradients,
    Outputs,
    assert_as_close,
    channels_last,
    contiguous,
    part,
)
from tests.test_cuda_scan_on_host import needs, run_under

SOURCE = Path(__file__).resolve().parent / "head_on_host.cpp"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-pthread"]
on_host = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler on this machine")


def on_gpu(test: Callable) -> Callable:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")(test))


# Threads a block, bytes of shared memory, blocks that run at once. The whole of a sample in one block; several blocks
# a sample, and fewer groups of them than samples; several tiles a block; tiles of few positions, and vectors in global
# memory.
WHOLE, SPLIT, TILES, CRAMPED = (64, 48 << 10, 3), (32, 1500, 5), (32, 900, 2), (32, 400, 3)


def build(folder: Path, name: str, *flags: str) -> Path:
    target = folder / name
    subprocess.run([COMPILER, *FLAGS, *flags, SOURCE, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("host"), "head.so", "-O1", "-shared", "-fPIC")))


class Host:
    """The four operators on host threads; every output has guarded rubbish in it before."""

    def __init__(self, library: ctypes.CDLL, case: Case, machine: tuple[int, int, int]):
        self.library, self.machine = library, machine
        # One channel's positions must be adjacent, as the bindings see to.
        self.x = case.features.contiguous() if case.features.shape[1] == 1 else case.features
        self.statistics = case.statistics
        self.batch, self.channels = self.x.shape[:2]
        self.positions, self.hidden = self.x.shape[2:].numel(), case.inputs[3].shape[0]
        self.guarded: list[Tensor] = []

    def step(self, map_: Tensor) -> int:
        """From one position to the next."""
        step = map_.stride(3) if map_.shape[3] > 1 else map_.stride(2)
        return 1 if self.positions == 1 else step

    def call(self, name: str, map_: Tensor, *arrays: Tensor) -> None:
        strides = (*map_.stride()[:2], self.step(map_))
        tensors = [map_, *(x.contiguous() for x in arrays)]
        pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
        sizes = (ctypes.c_int64 * 4)(self.batch, self.channels, self.positions, self.hidden)
        kernel = getattr(self.library, f"{name}_{str(map_.dtype).removeprefix('torch.')}")
        kernel(sizes, (ctypes.c_int64 * 3)(*strides), (ctypes.c_int64 * 3)(*self.machine), pointers)
        assert all((x[:4] == 77).all() and (x[-4:] == 77).all() for x in self.guarded), "written beyond an output"

    def empty(self, *shape: int, integers: bool = False) -> Tensor:
        size = torch.Size(shape).numel()
        whole = torch.full((size + 8,), 77, dtype=torch.int32 if integers else self.statistics)
        whole[4 : 4 + size] = -7 if integers else torch.nan
        self.guarded.append(whole)
        return whole[4 : 4 + size].view(shape)

    def pool(self) -> tuple[Tensor, ...]:
        shape = self.batch, self.channels
        outputs = self.empty(*shape), self.empty(*shape), self.empty(*shape, integers=True)
        self.call("pool", self.x, *outputs)
        return outputs

    def attend(self, *inputs: Tensor) -> Outputs:
        map_shape = self.batch, self.positions
        outputs = [self.empty(self.batch, self.channels), self.empty(*map_shape), self.empty(self.batch)]
        outputs += [self.empty(*map_shape), self.empty(*map_shape), self.empty(*map_shape, integers=True)]
        outputs.append(self.empty(*map_shape))
        self.call("attend", self.x, *inputs, *outputs)
        return Outputs(*outputs)

    def attend_backward(self, *arguments: Tensor) -> Gradients:
        by_channel, by_position = (self.batch, self.channels), (self.batch, self.positions)
        shapes = [by_channel] * 2 + [by_position] * 3
        shapes += [(self.hidden, self.positions)] * 2 + [(self.positions, self.hidden)] * 2
        outputs = [self.empty(*shape) for shape in shapes]
        self.call("attend_backward", self.x, *arguments, *outputs)
        return Gradients(*outputs)

    def features_backward(self, *arguments: Tensor) -> Tensor:
        # Amid other channels of the same layout, which must stay as they are.
        wide = self.x.new_full((self.batch, self.channels + 16, *self.x.shape[2:]), 77)
        wide = wide.contiguous(memory_format=torch.contiguous_format if self.step(self.x) == 1 else torch.channels_last)
        grad = wide[:, 8:-8].fill_(torch.nan)
        self.call("features_backward", grad, *arguments)
        assert (wide[:, :8] == 77).all() and (wide[:, -8:] == 77).all(), "written beyond the map"
        return grad


def run(library: ctypes.CDLL, case: Case, machine: tuple[int, int, int]):
    """Like `Case.run`, on host threads."""
    host = Host(library, case, machine)
    pooled, out = host.pool(), host.attend(*case.inputs)
    saved = (*out[:2], *out[3:])
    grads = host.attend_backward(*case.inputs, *saved, *case.grads)
    features_grad = host.features_backward(
        *case.inputs[:2], out.spatial_attention, out.peak_channel, pooled[2], case.grads[0], *grads[2:5],
        *case.pooled_grads
    )  # fmt: skip
    return pooled, out, grads, features_grad


def compare(case: Case, found: tuple) -> None:
    exact, pytorch = case.formulas(torch.float64), case.formulas(case.statistics)
    names = [*("mean", "peak", "peak_position"), *Outputs._fields, *(f"grad of {name}" for name in Gradients._fields)]
    flat = [(*pooled, *out, *grads, by_x) for pooled, out, grads, by_x in (found, exact, pytorch)]
    for name, *values in zip([*names, "dX"], *flat, strict=True):
        assert_as_close(name, *values)


# B, C, H, W, h and where it runs
PROBLEMS = {
    "one number": ((2, 1, 1, 1, 1), WHOLE),
    "one position": ((2, 70, 1, 1, 1), SPLIT),
    "one channel": ((3, 1, 3, 5, 2), WHOLE),
    "whole": ((2, 40, 3, 7, 3), WHOLE),
    "blocks": ((3, 83, 3, 3, 2), SPLIT),
    "aligned blocks": ((3, 96, 2, 4, 2), SPLIT),
    "tiles": ((2, 130, 3, 4, 2), TILES),
    "many channels": ((2, 300, 1, 2, 1), WHOLE),
    "more positions than threads": ((2, 9, 5, 7, 2), TILES),
    "little memory": ((2, 19, 3, 5, 2), CRAMPED),
    "more positions than a block writes": ((1, 3, 1, 258, 1), WHOLE),
    "empty": ((0, 5, 2, 2, 1), SPLIT),
}
LAYOUTS = {
    "contiguous": contiguous,
    "channels_last": channels_last,
    "part": part(contiguous),
    "part of channels_last": part(channels_last),
}


SMALL = ("blocks", "aligned blocks", "little memory", "one channel", "one position")
CASES = [
    (name, layout, torch.float64) for name in PROBLEMS for layout in LAYOUTS if name in SMALL or "part" not in layout
]
CASES += [
    (name, layout, dtype)
    for name in ("blocks", "aligned blocks", "little memory")
    for layout in ("contiguous", "channels_last")
    for dtype in (torch.float32, torch.bfloat16)
]


@on_host
@pytest.mark.parametrize("name, layout, dtype", CASES)
def test_values_and_gradients(library: ctypes.CDLL, name: str, layout: str, dtype: torch.dtype):
    size, machine = PROBLEMS[name]
    case = Case(size, dtype, LAYOUTS[layout])
    if size[2] * size[3] > 256:
        case.features[:, 1:, -1, -1] += 9  # a maximum that the second block of positions has to find
    compare(case, run(library, case, machine))


@on_host
@pytest.mark.parametrize("machine", [WHOLE, SPLIT, CRAMPED])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_first_of_several_maxima_and_nan_the_largest(library: ctypes.CDLL, layout: Callable, machine: tuple):
    case = Case((4, 66, 2, 4, 2), torch.float32, layout)
    case.inputs[0].fill_(0.5)
    x = case.features.zero_()
    x[0, 33:, 0, 0], x[1, 1:, -1, 2:] = 1, -0.0
    x[2, [20, 50], 1, 2], x[2, 20, 1, 3] = torch.nan, torch.nan
    x[3] = -torch.inf
    host = Host(library, case, machine)
    mean, peak, position = host.pool()
    out = host.attend(*case.inputs)
    flat = x.flatten(2)
    assert torch.equal(position.long(), flat.max(dim=2).indices) and position[2, 20] == 6
    assert torch.equal(out.peak_channel.long(), (flat * 0.5).max(dim=1).indices) and out.peak_channel[2, 6] == 20
    torch.testing.assert_close(peak, flat.amax(dim=2), equal_nan=True)
    torch.testing.assert_close(mean, flat.mean(dim=2), equal_nan=True)
    torch.testing.assert_close(out.peak_map, flat.amax(dim=1) * 0.5, equal_nan=True)
    assert out.spatial_attention[:2].isfinite().all() and out.spatial_attention[2].isnan().all()


@on_host
def test_an_unknown_label_has_no_loss_and_no_gradient(library: ctypes.CDLL):
    case = Case((3, 20, 3, 3, 2), torch.float32, channels_last)
    a_c, rows, _, *weights = case.inputs
    case.inputs = (a_c, rows + 1, torch.tensor([-1, 0, -1]), *weights)
    case.features[0, 3, 1, 1], case.grads[2][2] = torch.inf, torch.nan
    _, out, grads, _ = run(library, case, SPLIT)
    assert (out.loss[[0, 2]] == 0).all() and out.loss[1] > 0
    assert (grads.rows[[0, 2]] == 0).all() and (grads.adversary_map[[0, 2]] == 0).all()
    assert (grads.rows[1] != 0).all() and grads.mean_map[2].isfinite().all()


@on_host
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_same_bits_again_and_however_many_samples_at_a_time(library: ctypes.CDLL, layout: Callable):
    case = Case((3, 83, 2, 4, 2), torch.float32, layout)
    found = [run(library, case, (32, 2000, resident)) for resident in (6, 6, 12)]
    flat = [(*pooled, *out, *grads, by_x) for pooled, out, grads, by_x in found]
    for other in flat[1:]:
        assert all(map(torch.equal, flat[0], other))


THREAD = ("-O0", "-g", "-fsanitize=thread", "-DHEAD_ON_HOST_MAIN")
ADDRESS = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DHEAD_ON_HOST_MAIN")


@pytest.fixture(scope="module")
def watched_for_races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs(*THREAD)
    return build(tmp_path_factory.mktemp("thread"), "head", *THREAD)


@pytest.fixture(scope="module")
def watched_for_bounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs(*ADDRESS)
    return build(tmp_path_factory.mktemp("address"), "head", *ADDRESS)


@on_host
def test_no_data_race(watched_for_races: Path):
    done = run_under(watched_for_races)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[:3000]


@on_host
def test_a_barrier_that_orders_nothing_is_reported(watched_for_races: Path):
    done = run_under(watched_for_races, "racy")
    assert done.returncode == 66 and "data race" in done.stderr


@on_host
def test_no_access_out_of_bounds_and_no_undefined_behaviour(watched_for_bounds: Path):
    done = run_under(watched_for_bounds)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@on_host
def test_an_access_out_of_bounds_is_reported(watched_for_bounds: Path):
    done = run_under(watched_for_bounds, "short")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


OPERATORS = ("head_pool", "head_attend", "head_attend_backward", "head_features_backward")


@pytest.mark.skipif(not _extension.has_cuda_kernels(), reason="the extension was built without CUDA")
@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_are_registered_for_cuda(name: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dan_fast::{name}", "CUDA")


def on_device(case: Case) -> Case:
    """The same case, its arguments on the GPU."""
    moved = Case.__new__(Case)
    moved.dtype, moved.statistics, moved.features = case.dtype, case.statistics, case.features.cuda()
    for name in ("inputs", "grads", "pooled_grads"):
        setattr(moved, name, tuple(x.cuda() for x in getattr(case, name)))
    return moved


def flat_run(case: Case) -> list[Tensor]:
    pooled, out, grads, features_grad = case.run()
    return [*pooled, *out, *grads, features_grad]


GPU_SIZES = [(64, 2048, 7, 7, 4), (5, 63, 7, 7, 4), (3, 130, 16, 8, 10), (2, 40, 40, 40, 30), (2, 1, 1, 1, 1)]
GPU_SIZES += [(70, 512, 24, 8, 16), (2, 2048, 90, 50, 3)]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", GPU_SIZES, ids=str)
def test_the_gpu_does_what_the_formulas_say(size: tuple[int, ...], layout: str, dtype: torch.dtype):
    case = on_device(Case(size, dtype, LAYOUTS[layout]))
    found = case.run()
    assert found[3].stride() == torch.empty_like(case.features).stride()
    assert all(map(torch.equal, flat_run(case), flat_run(case))), "two runs differ"
    compare(case, found)


@on_gpu
def test_another_stream_and_a_cuda_graph():
    case = on_device(Case((64, 256, 7, 7, 4), torch.bfloat16, channels_last))
    expected = flat_run(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = flat_run(case)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, aside, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat_run(case)
    for _ in range(2):
        for x in captured:
            x.zero_()
        graph.replay()
        assert all(map(torch.equal, captured, expected))


@on_gpu
def test_the_host_does_not_wait():
    case = on_device(Case((8, 256, 7, 7, 4), torch.float32, channels_last))
    flat_run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flat_run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
