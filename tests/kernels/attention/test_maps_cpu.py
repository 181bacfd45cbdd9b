"""X'' and the attention adversary of given maps: the kernels against float64 formulas, and the operators over them."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dan_fast import NLCBAMWeights, _extension, functional, reference
from dan_fast.functional.attention.adversary import HeadAdversary
from tests.support.head_problems import DTYPES, LAYOUTS, assert_as_close, assert_varies_alike, channels_last, contiguous

pytestmark = pytest.mark.skipif(not _extension.loaded(), reason=f"no extension: {_extension.why_not()}")
ops = torch.ops.dan_fast
OPERATORS = ("head_refine", "head_refine_backward", "head_adversary", "head_adversary_backward")
# B, C, H, W: fewer and more numbers a row than a vector and a chain of sums hold, and ends within a vector.
SIZES = [(2, 1, 1, 1), (3, 3, 1, 2), (2, 63, 7, 7), (1, 2048, 7, 7), (2, 40, 16, 8), (3, 130, 3, 5), (2, 1, 7, 7)]
SIZES += [(2, 2100, 1, 1), (2, 300, 2, 1), (1, 17, 9, 15), (2, 20, 4, 4), (0, 5, 2, 2)]


@pytest.fixture(autouse=True)
def poison():
    """New memory holds NaN, so that a result that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Results(NamedTuple):
    refined: Tensor
    by_features: Tensor
    by_channel_attention: Tensor
    by_spatial_attention: Tensor
    loss: Tensor
    refined_map: Tensor
    adversary_map: Tensor
    by_features_of_adversary: Tensor
    by_refined_map: Tensor
    by_rows: Tensor


class Case:
    """Random arguments of the four operators, and what their formulas make of them in a dtype.

    The second map, and the gradient of the first, lie as `other` says.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        dtype: torch.dtype,
        layout: Callable[[Tensor], Tensor] = contiguous,
        other: Callable[[Tensor], Tensor] | None = None,
    ):
        batch, channels, height, width = size
        positions = height * width
        generator = torch.Generator().manual_seed(sum(size) * 7 + channels)
        statistics = torch.float64 if dtype == torch.float64 else torch.float32

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(statistics)

        self.dtype, self.statistics, self.other = dtype, statistics, other or layout
        self.features = layout((random(*size) + 0.3).to(dtype))
        self.refined, self.grad_refined = (self.other(random(*size).to(dtype)) for _ in range(2))
        self.attentions = torch.sigmoid(random(batch, channels)), torch.sigmoid(random(batch, positions))
        self.labels = torch.arange(batch) % 3 - 1
        self.rows = random(batch, channels, scale=channels**-0.5) * (self.labels >= 0)[:, None]
        self.grads = random(batch), random(batch, positions), random(batch, positions)

    def run(self) -> Results:
        refined = ops.head_refine(self.features, *self.attentions)
        by_refine = ops.head_refine_backward(self.features, *self.attentions, self.grad_refined)
        loss, *maps = ops.head_adversary(self.features, self.refined, self.rows, self.labels)
        by_adversary = ops.head_adversary_backward(self.features, self.rows, self.labels, *maps, *self.grads)
        return Results(refined, *by_refine, loss, *maps, *by_adversary)

    def formulas(self, dtype: torch.dtype) -> Results:
        x, y, by_y = (v.detach().to(dtype).flatten(2) for v in (self.features, self.refined, self.grad_refined))
        inputs = [v.to(dtype).requires_grad_() for v in (x, *self.attentions, self.rows.clone())]
        x, a_c, a_s, rows = inputs
        refined = x * a_c[:, :, None] * a_s[:, None, :]
        by_refine = torch.autograd.grad((refined * by_y).sum(), inputs[:3])
        refined_map = y.mean(dim=1).requires_grad_()
        adversary_map = (rows[:, :, None] * x).sum(dim=1)
        loss = torch.sigmoid(refined_map + adversary_map) * torch.sigmoid((refined_map - adversary_map).abs())
        known = self.labels >= 0
        results = torch.where(known, loss.sum(dim=1), 0), refined_map, torch.where(known[:, None], adversary_map, 0)
        total = sum((value * grad.to(dtype)).sum() for value, grad in zip(results, self.grads, strict=True))
        by_x, by_map, by_rows = torch.autograd.grad(total, (x, refined_map, rows))
        shape = self.features.shape
        return Results(
            refined.view(shape), by_refine[0].view(shape), *by_refine[1:], *results, by_x.view(shape), by_map, by_rows
        )


def check(case: Case, found: Results, what: object) -> None:
    exact, pytorch = case.formulas(torch.float64), case.formulas(case.statistics)
    for name, value, *expected in zip(Results._fields, found, exact, pytorch, strict=True):
        assert_as_close(f"{name} of {what}", value, *(x.detach() for x in expected))
        is_map = value.dim() == 4
        assert value.dtype == (case.dtype if is_map else case.statistics), name
        assert value.stride() == torch.empty_like(case.features).stride() if is_map else value.is_contiguous(), name


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
    assert found.by_channel_attention[1].isnan().nonzero().flatten().tolist() == [20]
    assert found.by_spatial_attention[1].isnan().nonzero().flatten().tolist() == [23]
    assert found.by_spatial_attention[2].isinf().nonzero().flatten().tolist() == [48]
    assert found.loss[1].isnan() and found.adversary_map[1].isnan().nonzero().flatten().tolist() == [23]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_an_unknown_label_has_no_loss_and_no_gradient(layout: Callable[[Tensor], Tensor]):
    case = Case((3, 20, 3, 3), torch.float32, layout)
    case.rows, case.labels = case.rows + 1, torch.tensor([-1, 0, -1])
    case.features[0, 3, 1, 1], case.grads[0][2] = torch.inf, torch.nan
    found = case.run()
    assert (found.loss[[0, 2]] == 0).all() and found.loss[1] > 0
    assert (found.adversary_map[[0, 2]] == 0).all() and (found.adversary_map[1] != 0).all()
    assert (found.by_rows[[0, 2]] == 0).all() and (found.by_features_of_adversary[[0, 2]] == 0).all()
    assert torch.equal(found.by_refined_map[[0, 2]], case.grads[1][[0, 2]]) and (found.by_rows[1] != 0).all()


def test_equal_maps_have_no_gradient_of_the_difference():
    """|A_at - A_ad| at 0: with both maps 0 their gradients are equal."""
    case = Case((3, 4, 2, 2), torch.float64)
    case.features.zero_(), case.refined.zero_()
    case.grads = (torch.ones(3).double(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double())
    found = case.run()
    slope = torch.where(case.labels >= 0, 0.125, 0.0)[:, None].double()
    torch.testing.assert_close(found.by_refined_map, slope.expand(3, 4))
    expected = (case.rows * slope)[:, :, None, None].expand(3, 4, 2, 2)
    torch.testing.assert_close(found.by_features_of_adversary, expected)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_same_bits_again_and_whatever_the_number_of_threads(layout: Callable[[Tensor], Tensor]):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(Case((9, 517, 7, 7), torch.float32, layout).run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for found in results[1:] for x, y in zip(found, results[0], strict=True))


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
    for wrong, message in (
        (right[0][0], r"features must be \(B, C, H, W\), got 3 dimensions"),
        (right[0].int(), "features must be float64, float32, bfloat16 or float16"),
        (right[0][:, :0], "features must have at least one channel and one position"),
        (right[0][:, :, :0], "features must have at least one channel and one position"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(0, wrong)


def _results() -> list[Tensor]:
    _extension.loaded()
    layouts = [(dtype, layout) for dtype in DTYPES for layout in (contiguous, channels_last)]
    return [x for dtype, layout in layouts for size in SIZES[2:6] for x in Case(size, dtype, layout).run()]


def test_the_other_instruction_sets(tmp_path):
    """The same bits, whatever this CPU would choose."""
    file = tmp_path / "results.pt"
    code = f"import torch, {__name__} as m; torch.save(m._results(), {str(file)!r})"
    sets = _extension.build_info()["instruction_sets"]
    expected = _results()
    for name in sets[: sets.index(ops.instruction_set())]:
        environment = os.environ | {"DAN_FAST_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        for found, wanted in zip(torch.load(file), expected, strict=True):
            assert torch.equal(found, wanted), name


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


def test_compiled_whole():
    inputs, labels = problem(torch.float32, torch.channels_last)
    expected = both(inputs, labels)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(inputs, labels)
    for actual, wanted in zip(compiled, expected, strict=True):
        assert torch.equal(actual, wanted)
    grads = (torch.autograd.grad(mixture(x), inputs) for x in (compiled, expected))
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted)
