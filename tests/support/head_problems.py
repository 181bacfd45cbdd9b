"""Problems for the attention head, and what is true of it on every device.

A device is a function `run` that makes the outputs of a `Case` and their gradients: by the operators on the CPU or on a
GPU, or by the CUDA kernels on host threads.
"""

from collections import namedtuple
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dan_fast.core.types import AttentionHeadOutput, NLCBAMWeights
from dan_fast.functional.attention.head import HeadSaved

ops = torch.ops.dan_fast

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Sizes of a `Case` whose rows are several vectors long, with odd ends.
SEVERAL_VECTORS = ((2, 63, 7, 7, 5, 4), (1, 2048, 7, 7, 170, 4), (5, 40, 16, 8, 3, 10), (3, 130, 3, 5, 11, 15))


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
NAMED_LAYOUTS = dict(zip(("contiguous", "channels_last", "part", "part of channels_last"), LAYOUTS[:4], strict=True))


Arguments = namedtuple("Arguments", ["features", *NLCBAMWeights._fields, "cam_weight", "labels"])
Gradients = namedtuple("Gradients", Arguments._fields[:-1])
Outputs = namedtuple("Outputs", [*AttentionHeadOutput._fields, *HeadSaved._fields])


def head(x: Tensor, *arguments: Tensor) -> Outputs:
    """Eqs. (2)-(4) as csrc/attention/head.h has them."""
    wc1, wc2, ws1, ws3, ws2, ws4, cam, labels = arguments
    x = x.flatten(2)
    mean, (peak, peak_position) = x.mean(dim=2), x.max(dim=2)
    of_mean, of_peak = mean @ wc1.mT, peak @ wc1.mT
    a_c = torch.sigmoid(of_mean.relu() @ wc2.mT + of_peak.relu() @ wc2.mT)
    scaled = x * a_c[:, :, None]
    g, (m, channel) = scaled.mean(dim=1), scaled.max(dim=1)
    known = labels >= 0
    a_ad = (torch.where(known[:, None], cam[labels * known], 0)[:, :, None] * x).sum(dim=1)

    def gate(v: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
        return torch.sigmoid((v @ reduce.mT).relu() @ expand.mT)

    a, b, c = gate(g, ws1, ws2), gate(m, ws1, ws2), gate(g, ws3, ws4)
    a_s = (torch.softmax(a[:, :, None] * b[:, None, :], dim=2) @ c[:, :, None])[:, :, 0]
    a_at = g * a_s
    loss = (torch.sigmoid(a_at + a_ad) * torch.sigmoid((a_at - a_ad).abs())).sum(dim=1)
    attended = a_c * (x * a_s[:, None, :]).mean(dim=2)
    loss = torch.where(known, loss, 0)
    return Outputs(attended, mean, a_c, a_s, loss, of_mean, of_peak, peak, peak_position, g, m, channel, a_ad)


def saved(out: Outputs) -> tuple[Tensor, ...]:
    """What the backward takes of the outputs: all but the loss."""
    return (*out[:4], *out[5:])


class Case:
    """Random arguments of both operators, and what their formulas make of them in a dtype.

    Of the classes 0 to 3 the first and the third have no sample; several samples have class 3.
    """

    def __init__(
        self,
        size: Sequence[int],  # B, C, H, W, units of the bottleneck of A_C, hidden units of those of A_S
        dtype: torch.dtype,
        layout: Callable[[Tensor], Tensor] = contiguous,
        classes: int = 4,
    ):
        batch, channels, height, width, units, hidden = size
        positions = height * width
        generator = torch.Generator().manual_seed(sum(size) * 7 + channels)
        statistics = torch.float64 if dtype == torch.float64 else torch.float32

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(statistics)

        self.dtype, self.statistics = dtype, statistics
        features = layout((random(batch, channels, height, width) + 0.3).to(dtype))
        bottleneck = random(units, channels, scale=channels**-0.5), random(channels, units, scale=units**-0.5)
        spatial = [random(hidden, positions) + 0.1 for _ in range(2)] + [random(positions, hidden) for _ in range(2)]
        cam_weight = random(classes, channels, scale=channels**-0.5)
        labels = torch.tensor([3, 3, -1, 1, 3])[torch.arange(batch) % 5].clamp(max=classes - 1)
        self.arguments = Arguments(features, *bottleneck, *spatial, cam_weight, labels)
        by_channel = [random(batch, channels) for _ in range(3)]
        # Nothing may come back to the second and the third.
        self.grads = AttentionHeadOutput(*by_channel, random(batch, positions), random(batch))

    def run(self) -> tuple[Outputs, Gradients]:
        out = Outputs(*ops.attention_head(*self.arguments))
        return out, Gradients(*ops.attention_head_backward(*self.arguments, *saved(out), *self.grads))

    def formulas(self, dtype: torch.dtype) -> tuple[Outputs, Gradients]:
        *inputs, labels = self.arguments
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        out = head(*leaves, labels)
        pairs = [(value, grad) for value, grad in zip(out[:5], self.grads, strict=True) if grad is not None]
        values, grads = [value for value, _ in pairs], [grad.to(dtype) for _, grad in pairs]
        return Outputs(*(x.detach() for x in out)), Gradients(*torch.autograd.grad(values, leaves, grads))


def assert_varies_alike(actual: Tensor, expected: Tensor) -> None:
    """A_S (B, HW) without its mean over the positions, which is most of it.

    What is allowed for a number near 1/2 in half precision may be more than A_S varies; so this is a share of that, a
    quarter in bfloat16: one that does not vary at all is off by the whole.
    """
    actual_part, part = (x.double() - x.double().mean(1, keepdim=True) for x in (actual, expected))
    varies = part.abs().max().item()
    assert varies > torch.finfo(torch.bfloat16).eps, f"A_S varies by {varies:.1g}, too little to be seen"
    share = {torch.bfloat16: 1 / 4, torch.float16: 1 / 16}.get(actual.dtype, 1e-3)
    error = (actual_part - part).abs().max().item()
    assert error <= share * varies, f"A_S, without its mean, is off by {error:.2g} and varies by {varies:.2g}"


def assert_as_close(name: str, result: Tensor, exact: Tensor, *pytorch: Tensor, roundings: float = 16) -> None:
    """Within 1e-10 in float64, else at most twice PyTorch's largest error in the same precision and `roundings`."""
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
        little = roundings * torch.finfo(torch.float32).eps * (0.1 + exact.abs().max())
        allowed = 2 * max((each.double() - exact).abs().max() for each in pytorch) + little
        assert (error <= allowed + (ulp * exact.abs() if ulp > 1e-6 else 0)).all(), (name, error.max(), allowed)


def assert_right(case: Case, out: Outputs, grads: Gradients, elsewhere: Case | None = None) -> None:
    """What a device gives for a case is what the formulas say, in the right dtypes and strides.

    `elsewhere` is the same case on another device, where PyTorch rounds otherwise: a sum of some thousand terms comes
    out a few times closer or further by the order of its terms alone.
    """
    exact = case.formulas(torch.float64)
    # The positions of a map are added one after the other, where PyTorch adds in pairs; on some CPUs its products come
    # out closer than on others.
    roundings = max(24.0, case.arguments.features.shape[2:].numel() ** 0.5)
    rounded = [case.formulas(case.statistics)]
    if elsewhere is not None:
        there = elsewhere.formulas(case.statistics)
        rounded.append(tuple(type(group)(*(x.to(case.arguments.features.device) for x in group)) for group in there))
    for at, group in enumerate((out, grads)):
        for name, value, *expected in zip(
            group._fields, group, exact[at], *(each[at] for each in rounded), strict=True
        ):
            assert_as_close(f"{type(group).__name__}.{name}", value, *expected, roundings=roundings)
    assert all(x.is_contiguous() and x.dtype in (case.statistics, torch.int32) for x in out)
    features, *of_weights = grads
    assert features.dtype == case.dtype
    assert all(x.is_contiguous() and x.dtype == case.statistics for x in of_weights)
    without_samples = [i for i in range(grads.cam_weight.shape[0]) if i not in case.arguments.labels]
    assert not grads.cam_weight[without_samples].any(), "a class without samples has a gradient"


Run = Callable[[Case], tuple[Outputs, Gradients]]


def assert_the_first_of_several_maxima_leads(run: Run, case: Case) -> None:
    """Of a case of two samples."""
    channels, width = case.arguments.features.shape[1], case.arguments.features.shape[3]
    case.arguments.wc2.zero_()  # A_C is 1/2
    x = case.arguments.features.zero_()
    x[0, channels // 2 :, 0, 0] = 1
    x[1, 1:, -1, width // 2 :] = -0.0
    out, grads = run(case)
    assert torch.equal(out.peak_position.long(), x.flatten(2).max(dim=2).indices)
    assert torch.equal(out.peak_channel.long(), (x.flatten(2) * 0.5).max(dim=1).indices)
    assert out.peak_channel[0, 0] == channels // 2 and out.peak_channel[1].eq(0).all()
    _, expected = case.formulas(case.statistics)
    torch.testing.assert_close(grads.features, expected.features.to(case.dtype), rtol=1e-4, atol=1e-5)


def assert_what_is_not_finite_spreads(run: Run, case: Case) -> None:
    """As in PyTorch, and to no other sample. Of a case of five samples of more than 40 channels and 6 positions."""
    features, wc1, wc2, *_ = case.arguments
    for x in (features, wc1):
        x.copy_(x.abs())
    wc2[[20, 30]] = -1e6  # A_C of two channels is 0
    finite_out, finite_grads = run(case)
    x = features.flatten(2).clone()
    x[1, [20, 30], 3], x[1, 20, 5] = -torch.inf, -torch.inf  # times 0 is NaN
    x[2, 7], x[2, :, 1] = -torch.inf, -torch.inf
    x[3, [4, 9], 3], x[3, 4, 5] = torch.nan, torch.nan
    features.copy_(x.view_as(features))
    out, grads = run(case)
    expected, _ = case.formulas(case.statistics)
    for name, found, wanted in zip(Outputs._fields, out, expected, strict=True):
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    assert out.peak_channel[1, [3, 5]].tolist() == [20, 20] and out.peak_position[3, 4] == 3
    assert out.channel_attention[1:3].isfinite().all() and out.channel_attention[3].isnan().all()
    for maps in (out.mean_map, out.peak_map):
        assert maps[1].isnan().nonzero().flatten().tolist() == [3, 5]
    # The weights' gradients are those of the whole batch; the samples without such numbers have the bits they had.
    assert all(x.isnan().any() for x in grads)
    assert not grads.cam_weight[[0, 2]].any()
    now, before = (*out, grads.features), (*finite_out, finite_grads.features)
    assert all(torch.equal(a[[0, 4]], b[[0, 4]]) for a, b in zip(now, before, strict=True))


def assert_an_unknown_label_has_no_loss_and_no_gradient(run: Run, case: Case) -> None:
    """Of a case of five samples."""
    case.arguments.labels.copy_(torch.tensor([-1, 1, -1, 3, 1]))
    known, unknown = [1, 3, 4], [0, 2]
    case.grads.adversary_loss[unknown] = 0
    expected, expected_grads = run(case)
    assert (expected.adversary_loss[unknown] == 0).all() and (expected.adversary_loss[known] > 0).all()
    assert expected_grads.cam_weight[[1, 3]].all() and not expected_grads.cam_weight[[0, 2]].any()
    case.grads.adversary_loss[unknown] = torch.tensor([torch.inf, torch.nan], dtype=case.statistics)
    out, grads = run(case)
    assert all(map(torch.equal, (*out, *grads), (*expected, *expected_grads)))
    # Whatever its map holds.
    case.arguments.features[0, 3, 0, 0], case.arguments.features[2, 1, 0, 1] = torch.inf, torch.nan
    out, grads = run(case)
    assert torch.equal(out.adversary_loss, expected.adversary_loss) and torch.equal(
        grads.cam_weight, expected_grads.cam_weight
    )
    assert torch.equal(grads.features[known], expected_grads.features[known])


def assert_equal_maps_have_no_gradient_of_their_difference(run: Run, case: Case) -> None:
    """|A_at - A_ad| at 0: with X = 0 both maps are 0, and the gradients of A_at = g A_S and of A_ad are equal."""
    case.arguments.features.zero_()
    for grad in case.grads:
        grad.zero_()
    case.grads.adversary_loss.fill_(1)
    out, grads = run(case)
    labels, cam_weight = case.arguments.labels, case.arguments.cam_weight
    rows = cam_weight[labels.clamp(min=0)][:, :, None]
    grad_mean_map = out.spatial_attention[:, None] * out.channel_attention[:, :, None] / rows.shape[1]
    expected = torch.where(labels >= 0, 0.125, 0.0)[:, None, None] * (rows + grad_mean_map)
    torch.testing.assert_close(grads.features.flatten(2), expected.to(case.dtype))


def assert_closed_channels_have_the_gradients_of_the_formulas(run: Run, case: Case) -> None:
    """A_C of 0, of a denormal and of hardly more; of a case in float64."""
    features, wc1, wc2, *_ = case.arguments
    for x in (features, wc1):
        x.copy_(x.abs())
    units = case.formulas(torch.float64)[0]
    of_sample_1 = (units.of_mean.relu() + units.of_peak.relu())[1].sum()
    wc2[::4], wc2[1::4], wc2[2::4] = -1e6, -708.9 / of_sample_1, -600 / of_sample_1
    out, grads = run(case)
    a_c = out.channel_attention
    assert not a_c[:, ::4].any() and 0 < a_c[1, 1::4].max() < 1e-307 and 0 < a_c[1, 2::4].max() < 1e-200
    _, exact = case.formulas(torch.float64)
    for name, found, wanted in zip(Gradients._fields, grads, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=name)
    torch.testing.assert_close(grads.wc2[2::4], exact.wc2[2::4], rtol=1e-9, atol=0)


def assert_an_infinite_gradient_ends_where_a_unit_is_off(run: Run, case: Case) -> None:
    """Of a case in float64 with two units or more."""
    features, wc1, *_ = case.arguments
    features.copy_(features.abs())
    wc1.copy_(wc1.abs())
    wc1[0].neg_()
    case.grads.attended[0] = torch.inf
    _, grads = run(case)
    _, exact = case.formulas(torch.float64)
    assert not grads.wc1[0].any() and not grads.wc1[1].isfinite().any()
    for name, found, wanted in zip(Gradients._fields, grads, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)


# What is true of a case, its size and its dtype. Host threads take those of few numbers alone.
UNUSUAL_AND_SMALL = [
    (assert_the_first_of_several_maxima_leads, (2, 66, 2, 4, 3, 2), torch.float32),
    (assert_what_is_not_finite_spreads, (5, 42, 2, 4, 3, 2), torch.float32),
    (assert_an_unknown_label_has_no_loss_and_no_gradient, (5, 20, 2, 2, 3, 2), torch.float32),
    (assert_equal_maps_have_no_gradient_of_their_difference, (3, 4, 2, 2, 2, 2), torch.float64),
    (assert_closed_channels_have_the_gradients_of_the_formulas, (2, 18, 2, 2, 3, 1), torch.float64),
    (assert_an_infinite_gradient_ends_where_a_unit_is_off, (2, 18, 2, 2, 3, 1), torch.float64),
]
MAXIMA_AMID = (
    *((2, 70, 7, 7, 6, 2), (2, 5, 1, 3, 6, 2), (2, 33, 9, 8, 6, 2)),
    *((2, 2100, 2, 1, 6, 2), (2, 2100, 7, 7, 6, 2)),
)
UNUSUAL = [(assert_the_first_of_several_maxima_leads, size, dtype) for size in MAXIMA_AMID for dtype in DTYPES]
UNUSUAL += [(assert_what_is_not_finite_spreads, (5, 150, 7, 7, 13, 3), dtype) for dtype in DTYPES]
UNUSUAL += [(assert_an_unknown_label_has_no_loss_and_no_gradient, (5, 20, 3, 3, 4, 2), dtype) for dtype in DTYPES]
UNUSUAL += [(holds, (2, 40, 7, 7, 6, 4), torch.float64) for holds, _, _ in UNUSUAL_AND_SMALL[4:]]
UNUSUAL += UNUSUAL_AND_SMALL[3:]


def results() -> tuple[list[Tensor], list[Tensor]]:
    """Of `SEVERAL_VECTORS`: what does not depend on whether * and + are one operation, and what does."""
    exact, rounded = [], []
    for dtype in DTYPES:
        for layout in LAYOUTS[:2]:
            for size in SEVERAL_VECTORS:
                case = Case(size, dtype, layout)
                out, grads = case.run()
                rounded += [*out, *grads]
                # A power of two times a number is not rounded; the gradients of these weights are of other products.
                for x in case.arguments[1:3]:
                    x.copy_(x.sign() * torch.exp2(x.abs().log2().round()))
                out, (grad_features, grad_wc1, grad_wc2, *others) = case.run()
                exact += [*out, grad_features, *others]
                rounded += [grad_wc1, grad_wc2]
    return exact, rounded
