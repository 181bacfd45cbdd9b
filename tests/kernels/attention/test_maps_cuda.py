"""The CUDA kernels of X'' and of the attention adversary without a GPU: their bodies run on host threads."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.devices import as_it_lies
from tests.support.head_problems import NAMED_LAYOUTS, channels_last, contiguous, part
from tests.support.maps_problems import Case, Results, check
from tests.support.toolchain import Guarded, call_on_host, needs_compiler

pytestmark = [pytest.mark.compile, needs_compiler]
SOURCE = "attention/refine_on_host.cpp"


class Host:
    """The four operators on host threads; every output has guarded rubbish in it before."""

    def __init__(self, library: ctypes.CDLL, case: Case):
        self.library, self.case = library, case
        self.sizes = (*case.features.shape[:2], case.features.shape[2:].numel())
        self.guarded = Guarded()

    def call(self, name: str, maps: list[Tensor], *arrays: Tensor) -> None:
        call_on_host(self.library, name, maps, [*maps, *(x.contiguous() for x in arrays)], self.sizes)
        self.guarded.assert_untouched()

    def empty(self, *shape: int) -> Tensor:
        return self.guarded.empty(shape, self.case.statistics)

    def write(self, name: str, read: list[Tensor], *arrays: Tensor) -> Tensor:
        written = self.guarded.map_like(self.case.features)
        self.call(name, [*read, written], *arrays)
        return torch.empty_like(self.case.features).copy_(written)

    def run(self) -> Results:
        case, (batch, channels, positions) = self.case, self.sizes
        refined = self.write("refine", [case.features], *case.attentions)
        grad_attentions = self.empty(batch, channels), self.empty(batch, positions)
        both = [case.features, case.grad_refined]
        grad_features = self.write("refine_backward", both, *case.attentions, *grad_attentions)
        results = self.empty(batch), self.empty(batch, positions), self.empty(batch, positions)
        self.call("adversary", [case.features, case.refined], case.rows, case.labels, *results)
        grad_rows, grad_map = self.empty(batch, channels), self.empty(batch, positions)
        known = case.rows, case.labels, *results[1:], *case.grads
        grad_x = self.write("adversary_backward", [case.features], *known, grad_rows, grad_map)
        return Results(refined, grad_features, *grad_attentions, *results, grad_x, grad_map, grad_rows)


# B, C, H, W: one block a sample and several; whole packs, ends within one; tiles of positions, whole and not.
SIZES = {
    "one number": (2, 1, 1, 1),
    "one position": (2, 70, 1, 1),
    "one channel": (2, 1, 3, 5),
    "packs over rows": (2, 72, 3, 7),
    "no whole pack": (1, 67, 3, 3),
    "packs in rows": (1, 16, 8, 9),
    "tiles": (1, 9, 5, 27),
    "empty": (0, 5, 2, 2),
}
CASES = [(name, layout, torch.float64) for name in SIZES for layout in ("contiguous", "channels_last")]
CASES += [("packs over rows", layout, torch.bfloat16) for layout in NAMED_LAYOUTS]
CASES += [("tiles", layout, torch.float32) for layout in NAMED_LAYOUTS]


@pytest.mark.parametrize("name, layout, dtype", CASES)
def test_values_and_gradients(library: ctypes.CDLL, name: str, layout: str, dtype: torch.dtype):
    case = Case(SIZES[name], dtype, NAMED_LAYOUTS[layout])
    check(case, Host(library, case).run(), name)


def padded(x: Tensor) -> Tensor:
    """channels_last with rows of whole packs, in which the channels end within one; NaN behind them."""
    return channels_last(torch.cat([x, torch.full_like(x[:, :2], torch.nan)], dim=1))[:, :-2]


@pytest.mark.parametrize(
    "layout, other", [(contiguous, part(contiguous)), (channels_last, part(channels_last)), (channels_last, padded)]
)
def test_maps_with_strides_of_their_own(library: ctypes.CDLL, layout: Callable, other: Callable):
    case = Case((2, 70, 2, 4), torch.float32, layout, other)
    check(case, Host(library, case).run(), "strides")


def test_an_unknown_label_has_no_loss_and_no_gradient(library: ctypes.CDLL):
    case = Case((2, 20, 3, 3), torch.float32)
    case.rows, case.labels = case.rows + 1, torch.tensor([-1, 0])
    case.features[0, 3, 1, 1] = torch.inf
    found = Host(library, case).run()
    assert found.loss[0] == 0 and found.loss[1] > 0
    assert (found.adversary_map[0] == 0).all() and (found.grad_rows[0] == 0).all()
    assert (found.grad_features_of_adversary[0] == 0).all() and (found.grad_rows[1] != 0).all()
    assert torch.equal(found.grad_refined_map[0], case.grads[1][0])


def on_device(case: Case) -> Case:
    """The same case, its arguments on the GPU."""
    for name, value in vars(case).items():
        if isinstance(value, Tensor):
            setattr(case, name, as_it_lies(value, "cuda"))
        elif isinstance(value, tuple):
            setattr(case, name, tuple(as_it_lies(x, "cuda") for x in value))
    return case


GPU_SIZES = [(64, 2048, 7, 7), (5, 63, 7, 7), (3, 130, 16, 8), (2, 40, 40, 40), (2, 1, 1, 1), (70, 512, 24, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", NAMED_LAYOUTS)
@pytest.mark.parametrize("size", GPU_SIZES, ids=str)
def test_the_gpu_does_what_the_formulas_say(size: tuple[int, ...], layout: str, dtype: torch.dtype):
    case = on_device(Case(size, dtype, NAMED_LAYOUTS[layout]))
    found = case.run()
    assert all(map(torch.equal, found, case.run())), "two runs differ"
    check(case, found, size)


@pytest.mark.gpu
def test_a_cuda_graph_and_a_host_that_does_not_wait():
    case = on_device(Case((64, 256, 7, 7), torch.bfloat16, channels_last))
    expected = case.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run()
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(map(torch.equal, captured, expected))
