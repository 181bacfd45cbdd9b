"""The attention head on the CPU in one call each way, against its formulas in float64 PyTorch and their autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.head_problems import (
    DTYPES,
    LAYOUTS,
    SEVERAL_VECTORS,
    UNUSUAL,
    Case,
    Outputs,
    assert_right,
    saved,
)
from tests.support.maps_problems import wrong_maps
from tests.support.running import by_threads
from tests.support.toolchain import needs_extension

pytestmark = [needs_extension, pytest.mark.usefixtures("poison")]
ops = torch.ops.dan_fast

# B, C, H, W, units of the bottleneck of channel attention, hidden units of that of spatial attention
SIZES = [(2, 1, 1, 1, 1, 1), (3, 3, 1, 2, 2, 1), *SEVERAL_VECTORS, (2, 1, 7, 7, 1, 49), (2, 2048, 1, 1, 16, 1)]
SIZES += [(2, 300, 2, 1, 25, 3), (1, 17, 9, 15, 1, 2), (0, 5, 2, 2, 2, 1)]


# All but the first two layouts are copied or differ in their strides alone.
IN_LAYOUTS = [(size, layout, dtype) for size in SIZES for layout in (0, 1) for dtype in DTYPES]
IN_LAYOUTS += [(size, n, dtype) for size in SIZES[1:3] for n in range(2, len(LAYOUTS)) for dtype in DTYPES[:2]]


@pytest.mark.parametrize(("size", "layout", "dtype"), IN_LAYOUTS, ids=str)
def test_values_and_gradients(size: tuple[int, ...], layout: int, dtype: torch.dtype):
    case = Case(size, dtype, LAYOUTS[layout])
    out, grads = case.run()
    assert_right(case, out, grads)
    assert grads.features.stride() == torch.empty_like(case.arguments.features).stride()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("missing", [("pooled",), ("channel_attention",), ("pooled", "channel_attention")], ids=str)
def test_nothing_comes_back_to_some_outputs(missing: tuple[str, ...], layout: Callable[[Tensor], Tensor]):
    case = Case((5, 63, 3, 5, 9, 2), torch.float64, layout)
    case.grads = case.grads._replace(**dict.fromkeys(missing))
    assert_right(case, *case.run())


def test_one_class():
    case = Case((5, 20, 2, 3, 3, 2), torch.float64, classes=1)
    assert_right(case, *case.run())
    assert case.run()[1].cam_weight.all()


def test_the_layouts_are_read_as_they_lie():
    """Pooling gives the same of every layout, but that each adds positions up in its own order; two are not copied."""
    size = (2, 200, 7, 7, 17, 4)
    expected, _ = Case(size, torch.float32).run()
    for layout in LAYOUTS[1:]:
        found, _ = Case(size, torch.float32, layout).run()
        for name in ("peak", "peak_position"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert (found.pooled - expected.pooled).abs().max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("holds, size, dtype", UNUSUAL)
def test_unusual_numbers(holds: Callable, size: tuple[int, ...], dtype: torch.dtype, layout: Callable):
    holds(Case.run, Case(size, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_same_bits_again_and_whatever_the_number_of_threads(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]):
    def run() -> list[Tensor]:
        out, grads = Case((9, 517, 7, 7, 43, 12), dtype, layout).run()
        return [*out, *grads]

    first, *others = by_threads(run)
    assert all(all(map(torch.equal, found, first)) for found in others)


def test_any_strides_of_the_other_arguments():
    case = Case((3, 21, 3, 4, 5, 2), torch.float32)
    expected_out, expected_grads = case.run()

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, x.dim() - 1)[..., ::2]

    features, *others = case.arguments
    arguments = (features, *map(spread, others))
    out = Outputs(*ops.attention_head(*arguments))
    of_outputs = (*map(spread, saved(out)), *map(spread, case.grads))
    grads = ops.attention_head_backward(*arguments, *of_outputs)
    assert all(map(torch.equal, (*out, *grads), (*expected_out, *expected_grads)))


def _calls(case: Case) -> dict[str, list[Tensor | None]]:
    """The arguments of each operator."""
    out, _ = case.run()
    return {
        "attention_head": [*case.arguments],
        "attention_head_backward": [*case.arguments, *saved(out), *case.grads],
    }


# Which of several arguments say how many there are of something, and which are then said to be wrong.
DOUBTFUL = {"wc1": "wc1|wc2", "ws1": "ws1|ws3"}


@pytest.mark.parametrize("op", ["attention_head", "attention_head_backward"])
def test_a_wrong_argument_is_named(op: str):
    right = _calls(Case((2, 5, 2, 3, 3, 4), torch.float32))[op]
    names = [argument.name for argument in getattr(ops, op).default._schema.arguments]
    for i, name in enumerate(names[1:], 1):

        def refused(wrong: Tensor, message: str, i: int = i) -> None:
            with pytest.raises(RuntimeError, match=message):
                getattr(ops, op)(*right[:i], wrong, *right[i + 1 :])

        shapes = [right[i][None], right[i][:, 1:] if right[i].dim() > 1 else right[i][:, None]]
        # Any number of classes will do but none.
        shapes += [] if name == "cam_weight" else [right[i][1:]]
        for wrong in shapes:
            refused(wrong, rf", ({DOUBTFUL.get(name, name)}) must be \(")
        other = right[i].double() if right[i].is_floating_point() else right[i].short()
        refused(other, rf", {name} must be (float32|int32|int64), got ")
        if name in ("peak_position", "peak_channel"):
            for index in (-1, 6 if name == "peak_position" else 5):
                refused(torch.full_like(right[i], index), rf", {name} must be what attention_head gave")
        if name == "cam_weight":
            refused(right[i][:0], "cam_weight must have at least one row")
    for wrong, message in wrong_maps(right[0]):
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, op)(wrong, *right[1:])
