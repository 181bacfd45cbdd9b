"""X'' and the attention adversary of given maps: the kernels against float64 formulas, and the operators over them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dan_fast import NLCBAMWeights, _extension, functional, reference
from dan_fast.functional.attention.adversary import HeadAdversary
from tests.support.head_problems import DTYPES, LAYOUTS, assert_varies_alike, channels_last, contiguous
from tests.support.maps_problems import OPERATORS, Case, check, wrong_maps
from tests.support.running import by_threads
from tests.support.toolchain import needs_extension

pytestmark = [needs_extension, pytest.mark.usefixtures("poison")]
ops = torch.ops.dan_fast
# B, C, H, W: fewer and more numbers a row than a vector and a chain of sums hold, and ends within a vector.
SIZES = [(2, 1, 1, 1), (3, 3, 1, 2), (2, 63, 7, 7), (1, 2048, 7, 7), (2, 40, 16, 8), (3, 130, 3, 5), (2, 1, 7, 7)]
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


def arguments(case: Case) -> dict[str, list[Tensor]]:
    maps = ops.head_adversary(case.features, case.refined, case.rows, case.labels)[1:]
    return {
        "head_refine": [case.features, *case.attentions],
        "head_refine_backward": [case.features, *case.attentions, case.grad_refined],
        "head_adversary": [case.features, case.refined, case.rows, case.labels],
        "head_adversary_backward": [case.features, case.rows, case.labels, *maps, *case.grads],
    }


@pytest.mark.compile
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("op", OPERATORS)
def test_registration(op: str, layout: Callable[[Tensor], Tensor]):
    """Schema, fake tensors, autograd and compilation."""
    given = arguments(Case((2, 5, 2, 3), torch.float64, layout))[op]
    if not op.endswith("backward"):
        given = [x.requires_grad_() if x.is_floating_point() else x for x in given]
    torch.library.opcheck(getattr(ops, op).default, tuple(given))


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


def results() -> list[Tensor]:
    layouts = [(dtype, layout) for dtype in DTYPES for layout in (contiguous, channels_last)]
    return [x for dtype, layout in layouts for size in SIZES[2:6] for x in Case(size, dtype, layout).run()]


def problem(dtype: torch.dtype = torch.float64, layout: torch.memory_format = torch.contiguous_format):
    """Arguments of `nl_cbam` and, with the CAM weight and labels, of `attention_adversary`."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 6, 3, 2), (2, 6), (6, 2), (2, 6), (2, 6), (6, 2), (6, 2), (4, 6)]
    features, *weights, cam_weight = ((torch.randn(s, generator=generator) * 0.6).to(dtype) for s in shapes)
    features = (features + 0.5).contiguous(memory_format=layout)
    # No hidden unit of A_S is off, and it varies.
    weights[2:] = [x.abs() for x in weights[2:4]] + [3 * x for x in weights[4:]]
    return [x.requires_grad_() for x in (features, *weights, cam_weight)], torch.tensor([3, -1, 3])


def both(inputs: list[Tensor], labels: Tensor, form=functional) -> list[Tensor]:
    features, *weights, cam_weight = inputs
    attended = form.nl_cbam(features, NLCBAMWeights(*weights))
    return [*attended, *form.attention_adversary(features, attended.refined, cam_weight, labels)]


def mixture(values: list[Tensor]) -> Tensor:
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in values)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_paths_agree_with_the_reference(layout: torch.memory_format):
    inputs, labels = problem(layout=layout)
    expected = both(inputs, labels, reference)
    expected += torch.autograd.grad(mixture(expected), inputs)
    kernels = both(inputs, labels)
    with _extension.disabled():
        pytorch = both(inputs, labels)
    for found in (kernels, pytorch):
        found = [*found, *torch.autograd.grad(mixture(found), inputs)]
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    assert kernels[0].stride() == inputs[0].stride()


def test_the_kernels_run_once_and_can_be_turned_off():
    inputs, labels = problem()
    with torch.profiler.profile() as profile:
        mixture(both(inputs, labels)).backward()
        with _extension.disabled():
            both(inputs, labels)
    names = [event.name for event in profile.events()]
    assert [names.count(f"dan_fast::{name}") for name in OPERATORS] == [1, 1, 1, 1]


def test_first_and_second_derivatives():
    inputs, labels = problem()
    assert torch.autograd.gradcheck(lambda *x: tuple(both(x, labels)), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: tuple(both(x, labels)), inputs, fast_mode=True)
    second = []
    for form in (functional, reference):
        first = torch.autograd.grad(mixture(both(inputs, labels, form)), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))
    for actual, expected in zip(*second, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("used", range(3))
def test_results_that_are_not_used_have_no_gradient(used: int, create_graph: bool):
    inputs, labels = problem()
    features, refined = inputs[0], inputs[0].detach().flip(1).requires_grad_()
    wanted = [features, refined, inputs[-1]]

    def grads(form) -> tuple[Tensor | None, ...]:
        value = form.attention_adversary(*wanted, labels)[used].square().sum()
        return torch.autograd.grad(value, wanted, create_graph=create_graph, allow_unused=True, materialize_grads=True)

    for actual, expected in zip(grads(functional), grads(reference), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_no_map_is_made_for_x2_where_only_the_adversary_wants_its_gradient():
    case = Case((2, 6, 3, 3), torch.float32)
    refined = case.refined.requires_grad_()
    loss = HeadAdversary.run(case.features, refined, case.rows, case.labels)[0]
    (grad,) = torch.autograd.grad(loss.sum(), refined)
    assert grad.shape == refined.shape and grad.untyped_storage().nbytes() == 2 * 9 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_that_of_pytorch(dtype: torch.dtype):
    inputs, labels = problem(dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = both(wide, labels, reference)
    expected = (*expected, *torch.autograd.grad(mixture(expected), wide))

    def run() -> list[Tensor]:
        output = both(inputs, labels)
        return [*output, *torch.autograd.grad(mixture(output), inputs)]

    kernels = run()
    with _extension.disabled():
        pytorch = run()
    for actual, same_precision, wanted in zip(kernels, pytorch, expected, strict=True):
        assert actual.dtype == dtype
        rounding = 4 * torch.finfo(dtype).eps * (1 + wanted.abs().max())
        allowed = 2 * (same_precision.double() - wanted).abs().max() + rounding
        assert (actual.double() - wanted).abs().max() <= allowed
    assert_varies_alike(kernels[2], expected[2])


def test_autocast_takes_half_precision_to_float32():
    inputs, labels = problem(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = both(inputs, labels)
    assert all(x.dtype == torch.float32 for x in found)


@pytest.mark.compile
def test_compiled_whole():
    inputs, labels = problem(torch.float32, torch.channels_last)
    expected = both(inputs, labels)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(inputs, labels)
    for actual, wanted in zip(compiled, expected, strict=True):
        assert torch.equal(actual, wanted)
    grads = (torch.autograd.grad(mixture(x), inputs) for x in (compiled, expected))
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted)
