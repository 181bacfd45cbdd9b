"""X'' and the attention adversary of given maps: the kernels against float64 formulas."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dan_fast.functional.attention.adversary import HeadAdversary
from tests.support.head_problems import DTYPES, LAYOUTS
from tests.support.maps_problems import OPERATORS, SEVERAL_VECTORS, Case, arguments, check, wrong_maps
from tests.support.running import by_threads
from tests.support.toolchain import needs_extension

pytestmark = [needs_extension, pytest.mark.usefixtures("poison")]
ops = torch.ops.dan_fast
# B, C, H, W: fewer and more numbers a row than a vector and a chain of sums hold, and ends within a vector.
SIZES = [(2, 1, 1, 1), (3, 3, 1, 2), *SEVERAL_VECTORS, (2, 1, 7, 7)]
SIZES += [(2, 2100, 1, 1), (2, 300, 2, 1), (1, 17, 9, 15), (2, 20, 4, 4), (0, 5, 2, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_values_and_gradients(dtype: torch.dtype, layout: int):
    for size in SIZES:
        case = Case(size, dtype, LAYOUTS[layout])
        check(case, case.run(), size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_maps_that_lie_differently(dtype: torch.dtype):
    def the_same_in_all_channels(x: Tensor) -> Tensor:
        return x[:, :1].expand_as(x)

    for layout in LAYOUTS:
        for other in (*LAYOUTS, the_same_in_all_channels):
            for size in ((2, 63, 7, 7), (2, 5, 1, 1), (3, 1, 2, 3)):
                case = Case(size, dtype, layout, other)
                check(case, case.run(), (size, layout, other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_refined_has_the_bits_of_pytorch(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]):
    case = Case((2, 67, 7, 9), dtype, layout)
    a_c, a_s = case.attentions
    expected = (case.features.to(case.statistics) * a_c[:, :, None, None] * a_s.view(2, 1, 7, 9)).to(dtype)
    assert torch.equal(ops.head_refine(case.features, a_c, a_s), expected)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_sample(layout: Callable[[Tensor], Tensor], dtype: torch.dtype):
    case = Case((4, 150, 7, 7), dtype, layout)
    clean = case.run()
    case.features[1, 20, 3, 2], case.features[2, 7, 6, 6] = torch.nan, torch.inf
    found = case.run()
    others = [0, 3]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(found, clean, strict=True))
    assert found.refined[1].isnan().sum() == 1 and found.refined[2].isinf().sum() == 1
    assert found.grad_channel_attention[1].isnan().nonzero().flatten().tolist() == [20]
    assert found.grad_spatial_attention[1].isnan().nonzero().flatten().tolist() == [23]
    assert found.grad_spatial_attention[2].isinf().nonzero().flatten().tolist() == [48]
    assert found.loss[1].isnan() and found.adversary_map[1].isnan().nonzero().flatten().tolist() == [23]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_an_unknown_label_has_no_loss_and_no_gradient(layout: Callable[[Tensor], Tensor]):
    case = Case((3, 20, 3, 3), torch.float32, layout)
    case.rows, case.labels = case.rows + 1, torch.tensor([-1, 0, -1])
    case.features[0, 3, 1, 1], case.grads[0][2] = torch.inf, torch.nan
    found = case.run()
    assert (found.loss[[0, 2]] == 0).all() and found.loss[1] > 0
    assert (found.adversary_map[[0, 2]] == 0).all() and (found.adversary_map[1] != 0).all()
    assert (found.grad_rows[[0, 2]] == 0).all() and (found.grad_features_of_adversary[[0, 2]] == 0).all()
    assert torch.equal(found.grad_refined_map[[0, 2]], case.grads[1][[0, 2]]) and (found.grad_rows[1] != 0).all()


def test_equal_maps_have_no_gradient_of_the_difference():
    """|A_at - A_ad| at 0: with both maps 0 their gradients are equal."""
    case = Case((3, 4, 2, 2), torch.float64)
    case.features.zero_(), case.refined.zero_()
    case.grads = (torch.ones(3).double(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double())
    found = case.run()
    slope = torch.where(case.labels >= 0, 0.125, 0.0)[:, None].double()
    torch.testing.assert_close(found.grad_refined_map, slope.expand(3, 4))
    expected = (case.rows * slope)[:, :, None, None].expand(3, 4, 2, 2)
    torch.testing.assert_close(found.grad_features_of_adversary, expected)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_same_bits_again_and_whatever_the_number_of_threads(layout: Callable[[Tensor], Tensor]):
    first, *others = by_threads(lambda: Case((9, 517, 7, 7), torch.float32, layout).run())
    assert all(torch.equal(x, y) for found in others for x, y in zip(found, first, strict=True))


def test_any_strides_of_the_other_arguments():
    case = Case((3, 21, 3, 4), torch.float32)
    expected = case.run()

    def spread(v: Tensor) -> Tensor:
        return v.repeat_interleave(2, v.dim() - 1)[..., ::2]

    case.attentions, case.grads = tuple(map(spread, case.attentions)), tuple(map(spread, case.grads))
    case.rows, case.labels = spread(case.rows), spread(case.labels)
    assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


@pytest.mark.parametrize("op", OPERATORS)
def test_a_wrong_argument_is_named(op: str):
    right = arguments(Case((2, 5, 2, 3), torch.float32))[op]
    names = [argument.name for argument in getattr(ops, op).default._schema.arguments]

    def call(i: int, wrong: Tensor) -> None:
        getattr(ops, op)(*right[:i], wrong, *right[i + 1 :])

    for i, name in enumerate(names[1:], 1):
        is_map = name in ("refined", "grad_refined")
        for wrong in (right[i][None], right[i][1:]):
            with pytest.raises(RuntimeError, match=f"{name} must {'have the shape' if is_map else 'be .B'}"):
                call(i, wrong)
        other = right[i].double() if right[i].is_floating_point() else right[i].short()
        with pytest.raises(RuntimeError, match=f"{name} must {'have the dtype' if is_map else 'be (float|int)'}"):
            call(i, other)
    for wrong, message in wrong_maps(right[0]):
        with pytest.raises(RuntimeError, match=message):
            call(0, wrong)


def test_no_map_is_made_for_x2_where_only_the_adversary_wants_its_gradient():
    case = Case((2, 6, 3, 3), torch.float32)
    refined = case.refined.requires_grad_()
    loss = HeadAdversary.run(case.features, refined, case.rows, case.labels)[0]
    (grad,) = torch.autograd.grad(loss.sum(), refined)
    assert grad.shape == refined.shape and grad.untyped_storage().nbytes() == 2 * 9 * 4
