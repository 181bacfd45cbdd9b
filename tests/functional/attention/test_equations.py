"""The equations of NL-CBAM and the adversary: worked by hand, by finite differences, and by each other."""

import math

import pytest
import torch

import dan_fast.functional as functional
import dan_fast.reference as reference
from dan_fast import NLCBAMWeights, _extension
from tests.support.attention_problems import (
    OPERATORS,
    assert_agree,
    call,
    flat_arguments,
    floating,
    problem,
    two_derivatives,
)

SIZES = {"several": (4, 7, 3, 2), "one": (1, 1, 1, 1), "row": (2, 3, 1, 5), "column": (2, 1, 4, 1)}
EVERY_OPERATOR = pytest.mark.parametrize("name", OPERATORS)
F64 = torch.float64


def derivatives(impl, name, arguments):
    return two_derivatives(lambda *tensors: call(impl, name, *tensors), arguments)


def f64(values):
    return torch.tensor(values, dtype=F64)


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def weights_of(channels, positions, **given):
    """Zero where none are given; bottlenecks of one unit."""
    reduce, expand = (1, positions), (positions, 1)
    shapes = NLCBAMWeights((1, channels), (channels, 1), reduce, reduce, expand, expand)._asdict()
    zeros = {name: torch.zeros(shape, dtype=F64) for name, shape in shapes.items()}
    return NLCBAMWeights(**zeros | {name: f64(values) for name, values in given.items()})


def test_channel_attention_by_hand(impl):
    # Means (2, -1), maxima (3, 1); hidden = relu(mean0 + 2 mean1) = 0 and relu(3 + 2) = 5.
    features = f64([[[[1.0, 3.0]], [[-3.0, 1.0]]]])
    weights = weights_of(2, 2, wc1=[[1.0, 2.0]], wc2=[[0.2], [-0.4]])
    refined, channel, spatial = impl.nl_cbam(features, weights)
    expected = f64([[1.0, -2.0]]).sigmoid()
    torch.testing.assert_close(channel, expected)
    torch.testing.assert_close(spatial, torch.full((1, 2), 0.5, dtype=F64))
    torch.testing.assert_close(refined, features * expected[:, :, None, None] * 0.5)


def test_spatial_attention_by_hand(impl):
    # wc = 0 makes A_C 1/2: X' = [[1, 2], [3, -1]], g = (2, 0.5), m = (3, 2).
    features = f64([[[[2.0, 4.0]], [[6.0, -2.0]]]])
    weights = weights_of(2, 2, ws1=[[1.0, -1.0]], ws3=[[0.5, 2.0]], ws2=[[1.0], [-2.0]], ws4=[[0.3], [-0.6]])
    a = [sigmoid(1.5), sigmoid(-3.0)]
    b = [sigmoid(1.0), sigmoid(-2.0)]
    c = [sigmoid(0.6), sigmoid(-1.2)]
    exps = [[math.exp(a[p] * b[q]) for q in range(2)] for p in range(2)]
    expected = [(row[0] * c[0] + row[1] * c[1]) / sum(row) for row in exps]
    output = impl.nl_cbam(features, weights)
    torch.testing.assert_close(output.spatial_attention, f64([expected]))
    refined = f64([[1.0, 2.0], [3.0, -1.0]]) * torch.tensor(expected)
    torch.testing.assert_close(output.refined, refined.view(1, 2, 1, 2), check_dtype=False, rtol=1e-6, atol=0)


def test_adversary_by_hand(impl):
    features = f64([[[[1.0, 2.0]], [[0.0, -1.0]]]])
    refined = f64([[[[0.5, 1.0]], [[1.5, 3.0]]]])
    cam_weight = f64([[9.0, 9.0], [2.0, 3.0]])
    loss, refined_map, adversary_map = impl.attention_adversary(features, refined, cam_weight, torch.tensor([1]))
    assert refined_map.tolist() == [[1.0, 2.0]]
    assert adversary_map.tolist() == [[2.0, 1.0]]
    assert loss.item() == pytest.approx(2 * sigmoid(3.0) * sigmoid(1.0))


@pytest.mark.slow
@EVERY_OPERATOR
def test_derivatives_are_those_of_finite_differences(impl, name):
    arguments = flat_arguments(name, *problem((2, 3, 2, 2), hidden=(2, 2), classes=3))

    def function(*tensors):
        return tuple(o for o in call(impl, name, *tensors) if o.requires_grad)

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def with_ties():
    features, weights, cam_weight, labels = problem((3, 6, 4, 4))
    features = features.relu()
    features[0] = 0  # every maximum is a tie
    features[1, 2] = features[1, 4] = 5.0  # a flat channel leads everywhere, and twice
    # No unit of the bottleneck is off.
    weights = weights._replace(wc1=weights.wc1.abs(), wc2=weights.wc2[[0, 1, 2, 3, 2, 5]])
    return features, weights, cam_weight, labels


@EVERY_OPERATOR
@pytest.mark.parametrize("size", [*SIZES, "ties"])
def test_functional_is_the_reference(name, size):
    """By the kernels and by PyTorch."""
    arguments = flat_arguments(name, *(with_ties() if size == "ties" else problem(SIZES[size])))
    expected = derivatives(reference, name, arguments)
    assert_agree(derivatives(functional, name, arguments), expected)
    with _extension.disabled():
        assert_agree(derivatives(functional, name, arguments), expected)


@EVERY_OPERATOR
@pytest.mark.parametrize("create_graph", [False, True])
def test_results_and_inputs_that_are_not_used_have_no_gradient(name, create_graph):
    def gradients(impl, at, inputs):
        loss = call(impl, name, *inputs)[at].square().sum()
        keywords = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
        wanted = [x for x in inputs if x.requires_grad]
        return [x.detach() for x in torch.autograd.grad(loss, wanted, **keywords)]

    arguments = flat_arguments(name, *problem())
    last_only = [*(x.detach() for x in arguments[:-2]), *arguments[-2:]]
    for inputs in (arguments, last_only):
        for at, output in enumerate(call(reference, name, *inputs)):
            if output.requires_grad:
                assert_agree(gradients(functional, at, inputs), gradients(reference, at, inputs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_a_max_goes_to_the_first(impl, layout):
    # Only the spatial maximum can reach A_C here: wc1 sees one channel with mean 0 and hidden relu(mean) = 0.
    features = torch.zeros(1, 2, 3, 40, dtype=F64)
    features[0, 0, 1, 7] = features[0, 0, 1, 30] = features[0, 0, 2, 0] = 2.0
    features[0, 0, 0] = -1.0
    features = features.contiguous(memory_format=layout).requires_grad_()
    weights = weights_of(2, 120, wc1=[[1.0, 0.0]], wc2=[[1.0], [1.0]])
    (gradient,) = torch.autograd.grad(impl.nl_cbam(features, weights).channel_attention.sum(), features)
    assert gradient.nonzero().tolist() == [[0, 0, 1, 7]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_a_channel_max_goes_to_the_first(impl, layout):
    features = torch.ones(1, 40, 2, 2, dtype=F64)
    features[0, :3, 0, 1] = 0.0
    features = features.contiguous(memory_format=layout).requires_grad_()
    one = torch.eye(4).tolist()
    weights = weights_of(40, 4, ws1=one, ws2=one, ws3=one, ws4=one)
    (gradient,) = torch.autograd.grad(impl.nl_cbam(features, weights).spatial_attention[0, 0], features)
    # The mean touches all channels alike, so what stands out from the last channel is the maximum's share.
    first = (gradient - gradient[:, -1:]).abs().argmax(dim=1).flatten()
    assert first.tolist() == [0, 3, 0, 0]
    assert ((gradient - gradient[:, -1:]).abs() > 1e-12).sum() == 4


@EVERY_OPERATOR
def test_layout_of_the_map_does_not_matter(name):
    arguments = flat_arguments(name, *problem((3, 5, 4, 2)))
    expected = derivatives(functional, name, arguments)
    last = [a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a for a in arguments]
    strided = [a.repeat_interleave(2, dim=0)[::2] if a.ndim == 4 else a.T.contiguous().T if a.ndim == 2 else a
               for a in arguments]  # fmt: skip
    assert_agree(derivatives(functional, name, last), expected, 1e-13)
    assert_agree(derivatives(functional, name, strided), expected, 1e-13)


def test_refined_keeps_the_layout_and_the_map_is_not_copied():
    features, weights, *_ = problem((3, 5, 4, 2))
    features = features.contiguous(memory_format=torch.channels_last)
    assert functional.nl_cbam(features, weights).refined.is_contiguous(memory_format=torch.channels_last)
    assert features.flatten(2).data_ptr() == features.data_ptr()


def test_head_forms_no_refined_map():
    features, weights, cam_weight, labels = problem((4, 64, 5, 5), hidden=(3, 3))
    features.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        functional.attention_head(features, weights, cam_weight, labels)
    maps = [t for t in saved if t.numel() >= features.numel()]
    assert maps and all(t.data_ptr() == features.data_ptr() for t in maps)


def test_head_is_its_parts(impl):
    features, weights, cam_weight, labels = problem()
    head = impl.attention_head(features, weights, cam_weight, labels)
    refined, channel, spatial = impl.nl_cbam(features, weights)
    adversary = impl.attention_adversary(features, refined, cam_weight, labels)
    expected = (refined.mean((2, 3)), features.mean((2, 3)), channel, spatial, adversary.loss)
    assert_agree(head, expected)


def test_what_the_head_returns_may_be_changed_in_place(impl):
    """As `Dropout(inplace=True)` and `losses *= ...` do."""
    grads = []
    for name in ("attended", "pooled", "adversary_loss"):
        for changes in (False, True):
            features, *rest = problem((2, 5, 2, 3))[:4]
            features.requires_grad_()
            result = getattr(impl.attention_head(features, *rest), name)
            result = result.mul_(2) if changes else 2 * result
            grads += torch.autograd.grad(result.square().sum(), features)
    for plain, changed in zip(grads[::2], grads[1::2], strict=True):
        assert torch.equal(plain, changed) and plain.abs().sum() > 0


def test_a_batch_of_unknown_labels_has_gradients_of_zero(impl):
    for batch in (3, 0):
        features, weights, cam_weight, _ = problem((batch, 4, 2, 2))
        leaves = [features, features.detach().flip(1), cam_weight]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        unknown = torch.full((batch,), -1)
        loss, _, adversary_map = impl.attention_adversary(*leaves, unknown)
        for output in (loss, adversary_map):
            gradients = torch.autograd.grad(output.sum(), leaves, retain_graph=True, materialize_grads=True)
            assert not any(gradient.any() for gradient in gradients)
        impl.attention_head(features, weights, cam_weight, unknown).adversary_loss.sum().backward()
        assert not features.grad.any() and not cam_weight.grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", ["features", "refined", "cam_weight"])
def test_an_unknown_label_has_no_loss_and_no_gradient_whatever_its_map_holds(by, at, value):
    features, weights, cam_weight, _ = problem((3, 4, 2, 2))
    leaves = {"features": features, "refined": features.detach().flip(1), "cam_weight": cam_weight}
    leaves[at][0] = value
    leaves = [leaf.requires_grad_() for leaf in leaves.values()]
    labels = torch.tensor([-1, 2, -1])
    loss, _, adversary_map = by.attention_adversary(*leaves, labels)
    gradients = torch.autograd.grad(loss.sum() + adversary_map.sum(), leaves)
    head = by.attention_head(leaves[0], weights, cam_weight, labels)
    of_head = torch.autograd.grad(head.adversary_loss.sum(), [features, cam_weight])
    for each in (loss, head.adversary_loss, adversary_map, *gradients[:2]):
        assert each.isfinite().all() and [bool(row.any()) for row in each] == [False, True, False]
    for gradient in (gradients[2], of_head[1]):
        assert gradient.isfinite().all() and gradient.any(dim=1).tolist() == [False, False, True, False, False]
    assert of_head[0][1].any() and not of_head[0][2].any()


def test_equal_maps_have_finite_second_derivatives_and_no_push(impl):
    # X'' = X and cam_weight = 1/C make A_at = A_ad everywhere: only sigmoid(A_at + A_ad) / 2 has a gradient.
    features = torch.tensor([[[[1.0, -2.0]], [[3.0, 0.5]]]], dtype=F64, requires_grad=True)
    refined = features.detach().clone().requires_grad_()
    cam_weight = torch.full((1, 2), 0.5, dtype=F64, requires_grad=True)
    leaves = [features, refined, cam_weight]
    loss, a_at, a_ad = impl.attention_adversary(features, refined, cam_weight, torch.tensor([0]))
    assert torch.equal(a_at, a_ad)
    first = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    slope = torch.sigmoid(2 * a_at) * torch.sigmoid(-2 * a_at) / 2 / 2
    torch.testing.assert_close(first[1], slope.view(1, 1, 1, 2).expand(1, 2, 1, 2))
    for gradient in torch.autograd.grad(sum(g.square().sum() for g in first), leaves):
        assert gradient.isfinite().all()


@EVERY_OPERATOR
def test_empty_batch(impl, name):
    arguments = flat_arguments(name, *problem((0, 7, 3, 2)))
    outputs = call(impl, name, *arguments)
    full = call(impl, name, *flat_arguments(name, *problem((2, 7, 3, 2))))
    assert [o.shape for o in outputs] == [(0, *o.shape[1:]) for o in full]
    assert all(output.requires_grad for output in outputs)
    for gradient in torch.autograd.grad(sum(o.sum() for o in outputs), floating(arguments)):
        assert gradient.abs().sum() == 0


def test_arguments_are_left_as_they_were(impl):
    features, weights, cam_weight, labels = problem()
    given = (features, *weights, cam_weight, labels)
    before = [t.clone() for t in given]
    impl.attention_head(features, weights, cam_weight, labels)
    assert all(map(torch.equal, before, given))
