"""The CUDA kernels of the attention head without a GPU: their bodies run on host threads."""

import copy
import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dan_fast.functional.attention.head import AttentionHead
from tests.support.devices import as_it_lies
from tests.support.head_problems import (
    NAMED_LAYOUTS,
    UNUSUAL,
    UNUSUAL_AND_SMALL,
    Case,
    Gradients,
    Outputs,
    assert_right,
    channels_last,
    contiguous,
    saved,
    strided,
)
from tests.support.toolchain import Guarded, call_on_host, needs_compiler

pytestmark = [pytest.mark.compile, needs_compiler]
SOURCE = "attention/head_on_host.cpp"

# Threads a block, bytes of shared memory for the map, blocks that run at once. The whole of a sample in one block;
# several blocks a sample, and fewer groups of them than samples; several tiles a block; tiles of few positions, and
# vectors in global memory.
WHOLE, SPLIT, TILES, CRAMPED = (64, 48 << 10, 3), (32, 1500, 5), (32, 900, 2), (32, 400, 3)
GPU = (256, 48 << 10, 2)


class Host:
    """Both directions on host threads; every output has guarded rubbish in it before."""

    def __init__(
        self,
        library: ctypes.CDLL,
        machine: tuple[int, int, int],
        blocks: int = 3,  # of the kernels that divide what there is among any number
        grad_layout: torch.memory_format | None = None,  # that of the map
    ):
        self.library, self.machine, self.grad_layout = library, (*machine, blocks), grad_layout

    def __call__(self, case: Case) -> tuple[Outputs, Gradients]:
        batch, channels, height, width = case.arguments.features.shape
        positions, units, hidden = height * width, case.arguments.wc1.shape[0], case.arguments.ws1.shape[0]
        sizes = batch, channels, positions, units, hidden, case.arguments.cam_weight.shape[0]
        guarded, arguments = Guarded(), [x.contiguous() for x in case.arguments]
        # One channel's positions must be adjacent, as the bindings see to.
        arguments[0] = x = case.arguments.features.contiguous() if channels == 1 else case.arguments.features
        out = Outputs(*guarded.like(AttentionHead.fake(*arguments)))
        call_on_host(self.library, "forward", [x, x], [*arguments, *out], sizes, self.machine)
        guarded.assert_untouched()
        grads = Gradients(guarded.map_like(x, self.grad_layout), *guarded.like(arguments[1:-1]))
        of_outputs = [*saved(out), *(grad if grad is None else grad.contiguous() for grad in case.grads)]
        tensors = [*arguments, *of_outputs, *grads]
        call_on_host(self.library, "backward", [x, grads.features], tensors, sizes, self.machine)
        guarded.assert_untouched()
        return out, grads


# B, C, H, W, units, h and where it runs
PROBLEMS = {
    "one number": ((2, 1, 1, 1, 1, 1), WHOLE),
    "one position": ((2, 70, 1, 1, 7, 1), SPLIT),
    "one channel": ((3, 1, 3, 5, 1, 2), WHOLE),
    "whole": ((5, 40, 3, 7, 17, 3), WHOLE),
    "blocks": ((3, 83, 3, 3, 9, 2), SPLIT),
    "aligned blocks": ((5, 96, 2, 4, 8, 2), SPLIT),
    "tiles": ((2, 130, 3, 4, 34, 2), TILES),
    "many channels": ((2, 300, 1, 2, 3, 1), WHOLE),
    "many units": ((3, 20, 1, 2, 70, 1), WHOLE),
    "more positions than threads": ((2, 9, 5, 7, 2, 2), TILES),
    "little memory": ((2, 19, 3, 5, 4, 2), CRAMPED),
    "more positions than a block writes": ((1, 3, 1, 258, 2, 1), WHOLE),
    "all of a block's threads": ((5, 19, 2, 2, 33, 1), GPU),
    "empty": ((0, 5, 2, 2, 3, 1), SPLIT),
}


SMALL = ("blocks", "aligned blocks", "little memory", "one channel", "one position")
CASES = [
    (name, layout, torch.float64)
    for name in PROBLEMS
    for layout in NAMED_LAYOUTS
    if name in SMALL or "part" not in layout
]
CASES += [
    (name, layout, dtype)
    for name in ("blocks", "aligned blocks", "little memory")
    for layout in ("contiguous", "channels_last")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("name, layout, dtype", CASES)
def test_values_and_gradients(library: ctypes.CDLL, name: str, layout: str, dtype: torch.dtype):
    size, machine = PROBLEMS[name]
    case = Case(size, dtype, NAMED_LAYOUTS[layout])
    if size[2] * size[3] > 256:
        case.arguments.features[:, 1:, -1, -1] += 9  # a maximum that the second block of positions has to find
    assert_right(case, *Host(library, machine)(case))


@pytest.mark.parametrize("missing", [("pooled",), ("channel_attention",)], ids=str)
def test_nothing_comes_back_to_some_outputs(library: ctypes.CDLL, missing: tuple[str, ...]):
    case = Case((2, 18, 2, 2, 3, 1), torch.float64)
    case.grads = case.grads._replace(**dict.fromkeys(missing))
    assert_right(case, *Host(library, SPLIT)(case))


@pytest.mark.parametrize("layout, other", [(contiguous, torch.channels_last), (channels_last, torch.contiguous_format)])
def test_the_gradient_of_the_map_has_a_layout_of_its_own(library: ctypes.CDLL, layout: Callable, other: object):
    case = Case((2, 35, 2, 2, 3, 1), torch.float64, layout)
    assert_right(case, *Host(library, SPLIT, grad_layout=other)(case))


@pytest.mark.parametrize("classes", [1, 9])
def test_one_class_and_many(library: ctypes.CDLL, classes: int):
    case = Case((5, 35, 1, 2, 3, 1), torch.float64, classes=classes)
    assert_right(case, *Host(library, SPLIT)(case))


@pytest.mark.parametrize("machine", [WHOLE, SPLIT, CRAMPED])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("holds, size, dtype", UNUSUAL_AND_SMALL)
def test_unusual_numbers(
    library: ctypes.CDLL, holds: Callable, size: tuple[int, ...], dtype: torch.dtype, layout: Callable, machine: tuple
):
    holds(Host(library, machine), Case(size, dtype, layout))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_same_bits_again_and_however_many_at_a_time(library: ctypes.CDLL, layout: Callable):
    """Samples, and blocks of the kernels that divide what there is among any number."""
    case = Case((5, 50, 1, 4, 11, 2), torch.float32, layout)
    ways = ((4, 3), (4, 3), (2, 1), (10, 40))
    results = [Host(library, (32, 600, resident), blocks)(case) for resident, blocks in ways]
    flat = [(*out, *grads) for out, grads in results]
    for other in flat[1:]:
        assert all(map(torch.equal, flat[0], other))


def on_device(case: Case) -> Case:
    """The same case, its arguments on the GPU."""
    moved = copy.copy(case)
    moved.arguments = case.arguments._make(as_it_lies(x, "cuda") for x in case.arguments)
    moved.grads = case.grads._make(x if x is None else as_it_lies(x, "cuda") for x in case.grads)
    return moved


def run_on_gpu(case: Case) -> tuple[Outputs, Gradients]:
    out, grads = on_device(case).run()
    return Outputs(*(x.cpu() for x in out)), Gradients(*(x.cpu() for x in grads))


def flat_run(case: Case) -> list[Tensor]:
    out, grads = case.run()
    return [*out, *grads]


def columns_left_out(x: Tensor) -> Tensor:
    """channels_last, but not evenly: the kernels read a contiguous copy, and the gradient is channels_last."""
    return channels_last(torch.cat([x, x], dim=3))[..., : x.shape[3]]


GPU_SIZES = [(64, 2048, 7, 7, 170, 4), (5, 63, 7, 7, 5, 4), (3, 130, 16, 8, 11, 10), (2, 40, 40, 40, 3, 30)]
GPU_SIZES += [(2, 1, 1, 1, 1, 1), (70, 512, 24, 8, 42, 16), (2, 2048, 90, 50, 170, 3), (300, 256, 7, 7, 21, 4)]
GPU_SIZES += [(0, 5, 2, 2, 2, 1)]
GPU_CASES = [(size, layout) for size in GPU_SIZES for layout in NAMED_LAYOUTS.values()]
GPU_CASES += [(size, layout) for size in GPU_SIZES[1:3] for layout in (strided, columns_left_out)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size, layout", GPU_CASES)
def test_the_gpu_does_what_the_formulas_say(size: tuple[int, ...], layout: Callable, dtype: torch.dtype):
    here = Case(size, dtype, layout)
    case = on_device(here)
    out, grads = case.run()
    assert grads.features.stride() == torch.empty_like(case.arguments.features).stride()
    assert all(map(torch.equal, flat_run(case), flat_run(case))), "two runs differ"
    assert_right(case, out, grads, elsewhere=here)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("holds, size, dtype", UNUSUAL)
# Half precision and float64 have been run on host threads and the CPU alone.
def test_unusual_numbers_on_the_gpu(holds: Callable, size: tuple[int, ...], dtype: torch.dtype, layout: Callable):
    holds(run_on_gpu, Case(size, dtype, layout))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_nothing_comes_back_to_some_outputs_on_the_gpu(layout: Callable):
    case = Case((2, 40, 7, 7, 6, 4), torch.float64, layout)
    case.grads = case.grads._replace(pooled=None, channel_attention=None)
    assert_right(case, *run_on_gpu(case))


@pytest.mark.gpu
def test_another_stream_and_a_cuda_graph():
    case = on_device(Case((64, 256, 7, 7, 21, 4), torch.bfloat16, channels_last))
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


@pytest.mark.gpu
def test_the_host_does_not_wait():
    case = on_device(Case((8, 256, 7, 7, 21, 4), torch.float32, channels_last))
    flat_run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flat_run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
