"""What the attention operators take: dtypes, autocast, compilation, and the errors for what does not fit."""

import re

import pytest
import torch
from torch import Tensor

import dan_fast.functional as functional
import dan_fast.reference as reference
from dan_fast import _extension
from dan_fast.nn import NLCBAM
from tests.support.attention_problems import (
    OPERATORS,
    assert_agree,
    call,
    flat_arguments,
    floating,
    mixture,
    problem,
    with_gradients,
)
from tests.support.head_problems import assert_varies_alike

# Relative to 1 + |b|: rounding of the result for half types, of the sums for float32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPERATORS)
def test_lower_precision_is_near_float64_and_no_worse_than_pytorch(name, dtype):
    arguments = flat_arguments(name, *problem((3, 24, 4, 2), dtype=dtype))
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in arguments]
    exact, found = with_gradients(reference, name, wide), with_gradients(functional, name, arguments)
    with _extension.disabled():
        pytorch = with_gradients(functional, name, arguments)
    assert all(x.dtype == dtype for x in found)
    outputs = len(found) - len(floating(arguments))
    assert_agree([x.double() for x in found[:outputs]], exact[:outputs], TOLERANCE[dtype])
    for actual, same_precision, wanted in zip(found, pytorch, exact, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * (1 + wanted.abs().max())
        allowed = 2 * (same_precision.double() - wanted).abs().max() + rounding
        assert (actual.double() - wanted).abs().max() <= allowed
    if name != "attention_adversary":
        at = 2 if name == "nl_cbam" else 3
        assert_varies_alike(found[at], exact[at])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_spatial_attention_that_does_not_vary_is_told_apart(dtype):
    """Its mean over the positions is right, and half of it is not enough; and where nothing varies nothing is shown."""
    exact = reference.nl_cbam(*problem((3, 96, 4, 2), hidden=(8, 2), dtype=torch.float64)[:2]).spatial_attention
    mean = exact.mean(1, keepdim=True)
    assert_varies_alike(exact.to(dtype), exact)
    for wrong in (mean.expand_as(exact), 0.5 * (mean + exact), exact.flip(1)):
        with pytest.raises(AssertionError):
            assert_varies_alike(wrong.to(dtype), exact)
    with pytest.raises(AssertionError, match="too little"):
        assert_varies_alike(mean.expand_as(exact), mean.expand_as(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_statistics_are_taken_in_float32(dtype):
    # 4095 ones and a half: a running sum in half precision would stop at 256 or 2048.
    features = torch.ones(1, 2, 64, 64, dtype=dtype)
    weights = NLCBAM(2, 4096, reduction=4096).to(dtype).weights
    head = functional.attention_head(features, weights, torch.ones(1, 2, dtype=dtype), torch.tensor([0]))
    assert head.pooled.tolist() == [[1, 1]]


@pytest.mark.usefixtures("path")
def test_autocast_computes_in_float32():
    features, weights, cam_weight, labels = problem(dtype=torch.float32)
    low = features.bfloat16()
    expected = functional.attention_head(low.float(), weights, cam_weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = functional.attention_head(low, weights, cam_weight, labels)
        output = functional.nl_cbam(features=low, weights=weights)
        adversary = functional.attention_adversary(low, output.refined, cam_weight, labels)
    assert all(map(torch.equal, got, expected))
    assert_agree([adversary.loss], [expected.adversary_loss], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_takes_half_precision_to_float32(name, dtype):
    arguments = flat_arguments(name, *problem(dtype=dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert all(x.dtype == torch.float32 for x in call(functional, name, *arguments))


@pytest.mark.compile
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_into_one_graph(name):
    features, *rest = problem(dtype=torch.float32)
    arguments = flat_arguments(name, features.contiguous(memory_format=torch.channels_last), *rest)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = (function(functional, name, *arguments) for function in (compiled, call))
    assert all(map(torch.equal, found, expected))
    torch.testing.assert_close(*(torch.autograd.grad(mixture(x), floating(arguments)) for x in (found, expected)))


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("features", Tensor.long, TypeError, "features must be a floating"),
        ("features", lambda x: x[0], ValueError, "features must be (B, C, H, W)"),
        ("features", lambda x: x[:, :0], ValueError, "features must be (B, C, H, W) with C"),
        ("weights", tuple, TypeError, "weights must be an NLCBAMWeights"),
        ("weights", lambda w: w._replace(wc1=w.wc1[:, 1:]), ValueError, "weights.wc1 must have shape (2, 7)"),
        ("weights", lambda w: w._replace(wc2=w.wc2.T), ValueError, "weights.wc2 must have shape (7, 2)"),
        ("weights", lambda w: w._replace(ws1=w.ws1[0]), ValueError, "weights.ws1 must be a matrix"),
        ("weights", lambda w: w._replace(ws3=w.ws3[:, 1:]), ValueError, "weights.ws3 must have shape (3, 6)"),
        ("weights", lambda w: w._replace(ws2=w.ws2[:, 1:]), ValueError, "weights.ws2 must have shape (6, 3)"),
        ("weights", lambda w: w._replace(ws4=w.ws4.float()), TypeError, "weights.ws4 is torch.float32"),
        ("cam_weight", lambda x: x.T, ValueError, "cam_weight must be (c, 7)"),
        ("cam_weight", Tensor.half, TypeError, "cam_weight is torch.float16"),
        ("cam_weight", lambda x: x.to("meta"), ValueError, "cam_weight is on meta"),
        ("labels", Tensor.int, TypeError, "labels must be an int64"),
        ("labels", lambda x: x[:3], ValueError, "labels must be (4,)"),
        ("labels", lambda x: torch.cat([x[:3], x.new_tensor([-2])]), ValueError, "got values from -2"),
        ("labels", lambda x: torch.cat([x[:3], x.new_tensor([5])]), ValueError, "labels must be -1 or a class in 0..4"),
        ("labels", lambda x: x.to("meta"), ValueError, "labels is on meta"),
        ("refined", lambda x: x[:, :, :2], ValueError, "refined must have the shape"),
        ("refined", Tensor.float, TypeError, "refined is torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(impl, name, change, kind, message):
    given = dict(zip(("features", "weights", "cam_weight", "labels"), problem(), strict=True))
    given["refined"] = given["features"]
    given[name] = change(given[name])
    for operator, names in (
        (impl.nl_cbam, ("features", "weights")),
        (impl.attention_adversary, ("features", "refined", "cam_weight", "labels")),
        (impl.attention_head, ("features", "weights", "cam_weight", "labels")),
    ):
        if name in names:
            with pytest.raises(kind, match=re.escape(message)):
                operator(*(given[each] for each in names))


def test_module_names_shapes_and_start():
    torch.manual_seed(0)
    attention = NLCBAM(channels=30, positions=8, reduction=12)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {
        "wc1": (2, 30), "wc2": (30, 2), "ws1": (1, 8), "ws3": (1, 8), "ws2": (8, 1), "ws4": (8, 1),
    }  # fmt: skip
    for name, weight in attention.weights._asdict().items():
        assert weight is getattr(attention, name)
        bound = weight.shape[1] ** -0.5
        assert bound / 4 < weight.abs().max() <= bound and weight.min() < 0
    features = torch.rand(2, 30, 4, 2)
    assert_agree(attention(features), functional.nl_cbam(features, attention.weights), 0)
    assert not torch.equal(NLCBAM(30, 8).wc1, attention.wc1)


@pytest.mark.parametrize("seed", range(8))
def test_no_unit_is_dead_on_an_even_map(seed):
    torch.manual_seed(seed)
    attention = NLCBAM(channels=24, positions=8)
    output = attention(torch.ones(1, 24, 4, 2))
    torch.autograd.backward(output.channel_attention.sum() + output.spatial_attention[0, 0])
    for name in ("wc1", "ws3"):
        assert (getattr(attention, name).grad.abs().sum(dim=1) > 0).all()


def test_a_map_of_another_size_than_the_modules_is_named():
    said = r"features must be \(B, 24, H, W\) with H W = 8, got \(1, 24, 3, 2\); for such maps make .*24, positions=6\)"
    attention = NLCBAM(channels=24, positions=8)
    with pytest.raises(ValueError, match=said):
        attention(torch.ones(1, 24, 3, 2))
    with pytest.raises(ValueError, match=r"make NLCBAM\(channels=3, positions=8\)"):
        attention.head(torch.ones(1, 3, 2, 4), torch.ones(5, 24), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("name", ["channels", "positions", "reduction"])
def test_module_sizes_below_one(name):
    with pytest.raises(ValueError, match=name):
        NLCBAM(**({"channels": 4, "positions": 4, "reduction": 2} | {name: 0}))
