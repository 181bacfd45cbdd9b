"""The passes of the attention head on the CPU, each against its formulas in float64 PyTorch and their autograd."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dan_fast import _extension

pytestmark = pytest.mark.skipif(not _extension.loaded(), reason=f"no extension: {_extension.why_not()}")
ops = torch.ops.dan_fast

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# B, C, H, W, h
SIZES = [(2, 1, 1, 1, 1), (3, 3, 1, 2, 1), (2, 63, 7, 7, 4), (1, 2048, 7, 7, 4), (2, 40, 16, 8, 10), (3, 130, 3, 5, 15)]
SIZES += [(2, 1, 7, 7, 49), (2, 2048, 1, 1, 1), (2, 300, 2, 1, 3), (1, 17, 9, 15, 2), (0, 5, 2, 2, 1)]


@pytest.fixture(autouse=True)
def poison():
    """New memory holds NaN, so that a result that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def part(layout: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A few channels of a wider map; NaN in the others."""

    def of(x: Tensor) -> Tensor:
        nan = torch.full((x.shape[0], 2, *x.shape[2:]), torch.nan, dtype=x.dtype)
        return layout(torch.cat([nan, x, nan], dim=1))[:, 2:-2]

    return of


def strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 3)[..., ::2]


LAYOUTS = (contiguous, channels_last, part(contiguous), part(channels_last), strided)


class Outputs(NamedTuple):
    attended: Tensor
    spatial_attention: Tensor
    loss: Tensor
    mean_map: Tensor
    peak_map: Tensor
    peak_channel: Tensor
    adversary_map: Tensor


class Gradients(NamedTuple):
    channel_attention: Tensor
    rows: Tensor
    mean_map: Tensor
    peak_map: Tensor
    adversary_map: Tensor
    ws1: Tensor
    ws3: Tensor
    ws2: Tensor
    ws4: Tensor


def pool(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    peak, position = x.flatten(2).max(dim=2)
    return x.flatten(2).mean(dim=2), peak, position


def attend(
    x: Tensor, a_c: Tensor, rows: Tensor, labels: Tensor, ws1: Tensor, ws3: Tensor, ws2: Tensor, ws4: Tensor
) -> Outputs:
    """Eqs. (3)-(4) as csrc/attention/head.h has them."""
    x = x.flatten(2)
    scaled = x * a_c[:, :, None]
    g, (m, channel) = scaled.mean(dim=1), scaled.max(dim=1)
    a_ad = (rows[:, :, None] * x).sum(dim=1)

    def gate(v: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
        return torch.sigmoid((v @ reduce.mT).relu() @ expand.mT)

    a, b, c = gate(g, ws1, ws2), gate(m, ws1, ws2), gate(g, ws3, ws4)
    a_s = (torch.softmax(a[:, :, None] * b[:, None, :], dim=2) @ c[:, :, None])[:, :, 0]
    a_at = g * a_s
    loss = (torch.sigmoid(a_at + a_ad) * torch.sigmoid((a_at - a_ad).abs())).sum(dim=1)
    attended = a_c * (x * a_s[:, None, :]).mean(dim=2)
    return Outputs(attended, a_s, torch.where(labels >= 0, loss, 0), g, m, channel, a_ad)


class Case:
    """Random arguments of all four operators, and what their formulas make of them in a dtype."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = contiguous):
        batch, channels, height, width, hidden = size
        positions = height * width
        generator = torch.Generator().manual_seed(sum(size) * 7 + channels)
        statistics = torch.float64 if dtype == torch.float64 else torch.float32

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(statistics)

        self.dtype, self.statistics = dtype, statistics
        self.features = layout((random(batch, channels, height, width) + 0.3).to(dtype))
        labels = torch.arange(batch) % 3 - 1
        rows = random(batch, channels, scale=channels**-0.5) * (labels >= 0)[:, None]
        weights = [random(hidden, positions) + 0.1 for _ in range(2)] + [random(positions, hidden) for _ in range(2)]
        self.inputs = (torch.sigmoid(random(batch, channels)), rows, labels, *weights)
        self.grads = (random(batch, channels), random(batch, positions), random(batch))
        self.pooled_grads = (random(batch, channels), random(batch, channels))

    def run(self) -> tuple[tuple[Tensor, ...], Outputs, Gradients, Tensor]:
        """What the operators give: pooled, attended, gradients of what went in, gradient of the map."""
        pooled = ops.head_pool(self.features)
        out = Outputs(*ops.head_attend(self.features, *self.inputs))
        saved = (*out[:2], *out[3:])
        grads = Gradients(*ops.head_attend_backward(self.features, *self.inputs, *saved, *self.grads))
        return pooled, out, grads, self.features_backward(pooled, out, grads)

    def features_backward(self, pooled: tuple[Tensor, ...], out: Outputs, grads: Gradients) -> Tensor:
        maps = grads.mean_map, grads.peak_map, grads.adversary_map
        unread = torch.full_like(self.features, torch.nan)
        return ops.head_features_backward(
            unread, *self.inputs[:2], out.spatial_attention, out.peak_channel, pooled[2], self.grads[0], *maps,
            *self.pooled_grads
        )  # fmt: skip

    def formulas(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Outputs, Gradients, Tensor]:
        x = self.features.to(dtype).detach().requires_grad_()
        a_c, rows, labels, *weights = (v.to(dtype) if v.is_floating_point() else v for v in self.inputs)
        leaves = [v.requires_grad_() for v in (v.detach().clone() for v in (a_c, rows, *weights))]
        pooled = pool(x)
        out = attend(x, leaves[0], leaves[1], labels, *leaves[2:])
        grad_attended, grad_attention, grad_loss, *pooled_grads = (v.to(dtype) for v in self.grads + self.pooled_grads)
        total = (out.attended * grad_attended).sum() + (out.spatial_attention * grad_attention).sum()
        total = total + (out.loss * grad_loss).sum()
        maps = (out.mean_map, out.peak_map, out.adversary_map)
        through = torch.autograd.grad(total, [*leaves, *maps], retain_graph=True)
        grads = Gradients(*through[:2], *through[-3:], *through[2:-3])
        total = total + sum((value * grad).sum() for value, grad in zip(pooled[:2], pooled_grads, strict=True))
        return pooled, out, grads, torch.autograd.grad(total, x)[0]


def assert_as_close(name: str, result: Tensor, exact: Tensor, pytorch: Tensor) -> None:
    """Within 1e-10 in float64, else no more than twice PyTorch's error in the same precision and a little."""
    assert result.shape == exact.shape, name
    if not exact.is_floating_point():
        assert torch.equal(result.long(), exact), name
        return
    assert torch.isfinite(result).all(), name
    error = (result.double() - exact).abs()
    if result.dtype == torch.float64:
        assert (error <= 1e-10 * (1 + exact.abs())).all(), name
    elif result.numel() > 0:
        ulp = torch.finfo(result.dtype).eps
        little = 16 * torch.finfo(torch.float32).eps * (0.1 + exact.abs().max())
        allowed = 2 * (pytorch.double() - exact).abs().max() + little
        assert (error <= allowed + (ulp * exact.abs() if ulp > 1e-6 else 0)).all(), (name, error.max(), allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_values_and_gradients(dtype: torch.dtype, layout: int):
    for size in SIZES:
        case = Case(size, dtype, LAYOUTS[layout])
        pooled, out, grads, features_grad = case.run()
        exact, pytorch = case.formulas(torch.float64), case.formulas(case.statistics)
        named = zip(("mean", "peak", "peak_position"), pooled, exact[0], pytorch[0], strict=True)
        named = [*named, *zip(Outputs._fields, out, exact[1], pytorch[1], strict=True)]
        named += zip((f"grad of {name}" for name in Gradients._fields), grads, exact[2], pytorch[2], strict=True)
        for name, value, *expected in named:
            assert_as_close(f"{name} of {size}", value, *expected)
            assert value.is_contiguous() and value.dtype in (case.statistics, torch.int32)
        assert_as_close(f"dX of {size}", features_grad, exact[3], pytorch[3])
        assert features_grad.dtype == dtype and features_grad.stride() == torch.empty_like(case.features).stride()


def test_the_layouts_are_read_as_they_lie():
    """A result of the same bits from the two layouts of a pass that adds positions up; neither is copied."""
    case = Case((2, 200, 7, 7, 4), torch.float32)
    for layout in LAYOUTS[1:]:
        other = Case((2, 200, 7, 7, 4), torch.float32, layout)
        pairs = zip(ops.head_pool(case.features), ops.head_pool(other.features), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_first_of_several_maxima(layout: Callable[[Tensor], Tensor]):
    for channels, height, width in ((70, 7, 7), (5, 1, 3), (2100, 2, 1), (33, 9, 8)):
        case = Case((2, channels, height, width, 2), torch.float32, layout)
        x = case.features.zero_()
        x[0, channels // 2 :, 0, 0] = 1
        x[1, 1:, -1, width // 2 :] = -0.0
        a_c = torch.full_like(case.inputs[0], 0.5)
        peak_position = ops.head_pool(x)[2]
        assert torch.equal(peak_position.long(), x.flatten(2).max(dim=2).indices)
        peak_channel = ops.head_attend(x, a_c, *case.inputs[1:])[5]
        assert torch.equal(peak_channel.long(), (x.flatten(2) * 0.5).max(dim=1).indices)
        assert peak_channel[0, 0] == channels // 2 and peak_channel[1].eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity(layout: Callable[[Tensor], Tensor], dtype: torch.dtype):
    case = Case((4, 150, 7, 7, 3), dtype, layout)
    clean = case.run()
    x = case.features
    x[1, [20, 100], 3, 2] = torch.nan
    x[1, 20, 5, 5] = torch.nan
    x[2, 7], x[2, :, 0, 1] = -torch.inf, -torch.inf
    pooled, out, grads, features_grad = case.run()
    mean, peak, position = pooled
    assert torch.equal(position.long(), x.flatten(2).max(dim=2).indices) and position[1, 20] == 23
    assert mean[1].isnan().nonzero().flatten().tolist() == [20, 100] == peak[1].isnan().nonzero().flatten().tolist()
    scaled = x.flatten(2).to(case.statistics) * case.inputs[0][:, :, None]
    assert torch.equal(out.peak_channel.long(), scaled.max(dim=1).indices) and out.peak_channel[1, 23] == 20
    assert out.mean_map[1].isnan().nonzero().flatten().tolist() == [23, 40] and out.peak_map[1, 23].isnan()
    assert out.loss[1].isnan() and out.spatial_attention[1].isnan().all() and out.attended[1].isnan().all()
    # The other samples have the bits they had; the weights' gradients are those of the whole batch.
    others = [0, 3]
    now, before = (*pooled, *out, *grads[:5], features_grad), (*clean[0], *clean[1], *clean[2][:5], clean[3])
    assert all(torch.equal(a[others], b[others]) for a, b in zip(now, before, strict=True))
    assert all(w.isnan().any() for w in grads[5:])


def test_an_unknown_label_has_no_loss_and_no_gradient():
    case = Case((3, 20, 3, 3, 2), torch.float32)
    a_c, rows, _, *weights = case.inputs
    case.inputs = (a_c, rows + 1, torch.tensor([-1, 0, -1]), *weights)
    case.features[0, 3, 1, 1], case.grads[2][2] = torch.inf, torch.nan
    _, out, grads, _ = case.run()
    assert (out.loss[[0, 2]] == 0).all() and out.loss[1] > 0
    assert (grads.rows[[0, 2]] == 0).all() and (grads.adversary_map[[0, 2]] == 0).all()
    assert (grads.rows[1] != 0).all() and grads.mean_map[2].isfinite().all()


def test_equal_maps_have_no_gradient_of_the_difference():
    """|A_at - A_ad| at 0: with X = 0 both maps are 0, and the gradients of A_at and A_ad are equal."""
    case = Case((3, 4, 2, 2, 2), torch.float64)
    case.features.zero_()
    case.grads = (torch.zeros(3, 4).double(), torch.zeros(3, 4).double(), torch.ones(3).double())
    _, out, grads, _ = case.run()
    slope = torch.where(case.inputs[2] >= 0, 0.125, 0.0)[:, None].double()
    torch.testing.assert_close(grads.adversary_map, slope.expand(3, 4))
    torch.testing.assert_close(grads.mean_map, slope * out.spatial_attention)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_channel_attention_of_zero(layout: Callable[[Tensor], Tensor]):
    case = Case((2, 40, 7, 7, 4), torch.float64, layout)
    case.inputs[0][:, ::3], case.inputs[0][1, 1::3] = 0.0, 1e-310
    _, _, grads, features_grad = case.run()
    _, _, exact, exact_grad = case.formulas(torch.float64)
    torch.testing.assert_close(grads.channel_attention, exact.channel_attention, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(features_grad, exact_grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_same_bits_again_and_whatever_the_number_of_threads(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 3):
            torch.set_num_threads(threads)
            pooled, out, grads, features_grad = Case((9, 517, 7, 7, 12), dtype, layout).run()
            results.append([*pooled, *out, *grads, features_grad])
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0], strict=True))


def test_any_strides_of_the_other_arguments():
    case = Case((3, 21, 3, 4, 2), torch.float32)
    expected = case.run()

    def spread(v: Tensor) -> Tensor:
        return v.repeat_interleave(2, v.dim() - 1)[..., ::2]

    case.inputs = tuple(map(spread, case.inputs))
    case.grads, case.pooled_grads = tuple(map(spread, case.grads)), tuple(map(spread, case.pooled_grads))
    found = case.run()
    assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))
    assert torch.equal(found[3], expected[3])


def test_the_schemas_tell_what_is_written():
    case = Case((2, 5, 2, 3, 2), torch.float32)
    pooled, out, grads, _ = case.run()
    saved = (*out[:2], *out[3:])
    wide = (out.spatial_attention, out.peak_channel, pooled[2], case.grads[0], *grads[2:5], *case.pooled_grads)
    for op, arguments in (
        (ops.head_pool, (case.features,)),
        (ops.head_attend, (case.features, *case.inputs)),
        (ops.head_attend_backward, (case.features, *case.inputs, *saved, *case.grads)),
        (ops.head_features_backward, (case.features, *case.inputs[:2], *wide)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils="test_schema")


def _arguments() -> dict[str, list[Tensor]]:
    case = Case((2, 5, 2, 3, 4), torch.float32)
    pooled, out, grads, _ = case.run()
    saved = (*out[:2], *out[3:])
    wide = [out.spatial_attention, out.peak_channel, pooled[2], case.grads[0], *grads[2:5], *case.pooled_grads]
    return {
        "head_pool": [case.features],
        "head_attend": [case.features, *case.inputs],
        "head_attend_backward": [case.features, *case.inputs, *saved, *case.grads],
        "head_features_backward": [case.features, *case.inputs[:2], *wide],
    }


@pytest.mark.parametrize("op", ["head_pool", "head_attend", "head_attend_backward", "head_features_backward"])
def test_a_wrong_argument_is_named(op: str):
    right = _arguments()[op]
    names = [argument.name for argument in getattr(ops, op).default._schema.arguments]
    for i, name in enumerate(names[1:], 1):
        shapes = [right[i][None], right[i][1:]] + ([right[i][:, 1:]] if right[i].dim() > 1 else [])
        for wrong in shapes:
            # The first of the four weights says how many hidden units there are.
            where = "ws1|ws3" if name == "ws1" else name
            with pytest.raises(RuntimeError, match=rf", ({where}) must be \("):
                getattr(ops, op)(*right[:i], wrong, *right[i + 1 :])
        other = right[i].double() if right[i].is_floating_point() else right[i].short()
        with pytest.raises(RuntimeError, match=rf", {name} must be (float32|int32|int64), got "):
            getattr(ops, op)(*right[:i], other, *right[i + 1 :])
        if name == "peak_channel":
            for channel in (-1, 5):
                with pytest.raises(RuntimeError, match=r", peak_channel must be what head_attend gave"):
                    getattr(ops, op)(*right[:i], torch.full_like(right[i], channel), *right[i + 1 :])
    for wrong, message in (
        (right[0][0], r"features must be \(B, C, H, W\), got 3 dimensions"),
        (right[0].int(), "features must be float64, float32, bfloat16 or float16"),
        (right[0][:, :0], "features must have at least one channel and one position"),
        (right[0][:, :, :0], "features must have at least one channel and one position"),
    ):
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, op)(wrong, *right[1:])


def test_the_other_instruction_sets(tmp_path):
    """The same bits, whatever this CPU would choose."""
    file = tmp_path / "results.pt"
    code = f"import torch, runpy; m = runpy.run_path({__file__!r}); torch.save(m['_results'](), {str(file)!r})"
    sets = _extension.build_info()["instruction_sets"]
    expected = _results()
    for name in sets[: sets.index(ops.instruction_set())]:
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"DAN_FAST_ISA": name}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        passes, whole = torch.load(file)
        for found, wanted in zip(passes, expected[0], strict=True):
            assert torch.equal(found, wanted), name
        # The products of the bottleneck are fused multiply-adds where there are any.
        for found, wanted in zip(whole, expected[1], strict=True):
            limit = 1e-12 if found.dtype == torch.float64 else 2**-7 if found.dtype.itemsize < 4 else 1e-5
            assert (found - wanted).abs().max() <= limit * (wanted.abs().max() + 1), name


def _results() -> tuple[list[Tensor], list[Tensor]]:
    """Of the passes, and of the whole head."""
    _extension.loaded()
    passes, whole = [], []
    for dtype in DTYPES:
        for layout in LAYOUTS[:2]:
            for size in SIZES[2:6]:
                case = Case(size, dtype, layout)
                pooled, out, grads, features_grad = case.run()
                passes += [*pooled, *out, *grads, features_grad]
                whole += _whole_head(case, size[1] // 3)
    return passes, whole


def _whole_head(case: Case, units: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(units)
    channels = case.features.shape[1]
    shapes = [(units, channels), (channels, units), (4, channels)]
    wc1, wc2, cam_weight = (torch.randn(s, generator=generator, dtype=case.statistics) / 8 for s in shapes)
    arguments = (case.features, wc1, wc2, *case.inputs[3:], cam_weight, case.inputs[2])
    output = ops.attention_head(*arguments)
    attended, spatial, loss = case.grads
    grads = (attended, case.pooled_grads[0], case.pooled_grads[1], spatial, loss)
    return [*output[:5], *ops.attention_head_backward(*arguments, *output[:4], *output[5:], *grads)]
