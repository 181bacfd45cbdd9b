"""The attention head as one operator: registration, derivatives, which path runs. The kernels have their own tests."""

import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from dan_fast import NLCBAMWeights, _extension, functional, reference
from tests.support.head_problems import assert_varies_alike

pytestmark = pytest.mark.skipif(not _extension.loaded(), reason="the compiled extension was not built")


def problem(dtype=torch.float64, layout=torch.contiguous_format, batch=4, channels=6, size=(3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    positions = size[0] * size[1]

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    features = (draw(batch, channels, *size) + 0.5).to(memory_format=layout)
    shapes = [(3, channels), (channels, 3), (2, positions), (2, positions), (positions, 2), (positions, 2)]
    weights = [draw(*shape, scale=0.5) for shape in shapes]
    weights[2:4] = [x.abs() for x in weights[2:4]]  # no hidden unit of A_S is off, and it varies
    labels = torch.tensor([2, -1, 0, 2, 1])[:batch]
    return [x.requires_grad_() for x in (features, *weights, draw(3, channels, scale=0.3))], labels


def head(inputs, labels, form=functional):
    features, *weights, cam_weight = inputs
    return form.attention_head(features, NLCBAMWeights(*weights), cam_weight, labels)


def mixture(output):
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in output)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_both_paths_agree_with_the_reference(batch, layout):
    inputs, labels = problem(layout=layout, batch=batch)
    expected = head(inputs, labels, reference)
    expected_grads = torch.autograd.grad(mixture(expected), inputs, allow_unused=True, materialize_grads=True)
    with _extension.disabled():
        torch_form = head(inputs, labels)
    kernels = head(inputs, labels)
    for output in (kernels, torch_form):
        grads = torch.autograd.grad(mixture(output), inputs)
        for actual, wanted in zip((*output, *grads), (*expected, *expected_grads), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
        assert output is torch_form or grads[0].stride() == inputs[0].stride()


def test_the_kernels_run_and_can_be_turned_off():
    inputs, labels = problem()
    with torch.profiler.profile() as profile:
        mixture(head(inputs, labels)).backward()
        with _extension.disabled():
            torch_form = head(inputs, labels)
    names = [event.name for event in profile.events()]
    for name in ("attention_head", "attention_head_backward"):
        assert names.count(f"dan_fast::{name}") == 1
    assert "dan_fast" not in str(torch_form.attended.grad_fn)


def test_an_infinite_gradient_ends_where_a_unit_is_off():
    inputs, labels = problem(batch=1)
    with torch.no_grad():
        inputs[0].abs_()
        inputs[1][0].abs_().neg_()
    results = head(inputs, labels)
    with _extension.disabled():
        expected = head(inputs, labels)
    grads = [torch.randn_like(x) for x in results]
    grads[0][0] = torch.inf
    found = torch.autograd.grad(results, inputs, grads)
    assert not found[1][0].any() and not found[1].isfinite().all()
    for a, b in zip(found, torch.autograd.grad(expected, inputs, grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_the_same_bits_whatever_the_number_of_threads():
    inputs, labels = problem(torch.float32, batch=5, channels=300, size=(7, 7))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = head(inputs, labels)
            results.append([*output, *torch.autograd.grad(mixture(output), inputs)])
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_a_maximum_from_nowhere_is_refused():
    inputs, labels = problem(batch=2)
    inputs = [x.detach() for x in inputs]
    output = torch.ops.dan_fast.attention_head.default(*inputs, labels)
    saved = [*output[:4], *output[5:]]
    grads = [torch.ones_like(x) for x in output[:5]]
    for place, name in ((7, "peak_position"), (10, "peak_channel")):
        wrong = list(saved)
        wrong[place] = wrong[place] + 10
        with pytest.raises(RuntimeError, match=f"{name} must be what attention_head gave"):
            torch.ops.dan_fast.attention_head_backward.default(*inputs, labels, *wrong, *grads)


def test_first_and_second_derivatives():
    inputs, labels = problem(batch=2, channels=4, size=(2, 2))

    def run(*inputs):
        return tuple(head(inputs, labels))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_loss_on_gradients_is_that_of_the_reference():
    inputs, labels = problem()
    second = []
    for form in (functional, reference):
        first = torch.autograd.grad(mixture(head(inputs, labels, form)), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))
    for actual, expected in zip(*second, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_under_activation_checkpointing():
    inputs, labels = problem()
    output = torch.utils.checkpoint.checkpoint(lambda *x: tuple(head(x, labels)), *inputs, use_reentrant=False)
    grads = torch.autograd.grad(mixture(output), inputs)
    for actual, expected in zip(grads, torch.autograd.grad(mixture(head(inputs, labels)), inputs), strict=True):
        assert torch.equal(actual, expected)


def test_only_the_wanted_gradients():
    inputs, labels = problem()
    inputs = [x.detach() for x in inputs]
    inputs[-1].requires_grad_()
    output = head(inputs, labels)
    (grad,) = torch.autograd.grad(output.adversary_loss.sum(), inputs[-1], create_graph=True)
    (expected,) = torch.autograd.grad(head(inputs, labels, reference).adversary_loss.sum(), inputs[-1])
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.compile
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_registration(layout):
    inputs, labels = problem(layout=layout, batch=2)
    torch.library.opcheck(torch.ops.dan_fast.attention_head.default, (*inputs, labels))


@pytest.mark.compile
def test_compiled_whole():
    inputs, labels = problem(torch.float32)
    compiled = torch.compile(functional.attention_head, fullgraph=True, backend="aot_eager")
    features, *weights, cam_weight = inputs
    output = compiled(features, NLCBAMWeights(*weights), cam_weight, labels)
    expected = head(inputs, labels)
    for actual, wanted in zip(output, expected, strict=True):
        assert torch.equal(actual, wanted)
    grads = zip(*(torch.autograd.grad(mixture(x), inputs) for x in (output, expected)), strict=True)
    for actual, wanted in grads:
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_that_of_pytorch(dtype):
    inputs, labels = problem(dtype, channels=64, size=(7, 7))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = head(wide, labels, reference)
    expected = (*expected, *torch.autograd.grad(mixture(expected), wide))

    def run():
        output = head(inputs, labels)
        return (*output, *torch.autograd.grad(mixture(output), inputs))

    kernels = run()
    with _extension.disabled():
        pytorch = run()
    for actual, same_precision, wanted in zip(kernels, pytorch, expected, strict=True):
        assert actual.dtype == dtype
        rounding = 4 * torch.finfo(dtype).eps * (1 + wanted.abs().max())
        allowed = 2 * (same_precision.double() - wanted).abs().max() + rounding
        assert (actual.double() - wanted).abs().max() <= allowed
    assert_varies_alike(kernels[3], expected[3])


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_read_as_it_lies(autocast):
    """No operation makes a map in float32 of the one in half precision, nor another of its gradient."""
    inputs, labels = problem(torch.bfloat16)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            for x in results if isinstance(results, tuple) else (results,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= inputs[0].nbytes:
                    made.append((str(func), x.dtype))
            return results

    # As in training, where autocast meets weights in float32.
    weights = [x.detach().float().requires_grad_() if autocast else x for x in inputs[1:]]
    with Watch():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = head([inputs[0], *weights], labels)
        loss = sum(x.sum() for x in output)
        grads = torch.autograd.grad(loss, [inputs[0], *weights])
    assert all(x.dtype == (torch.float32 if autocast else torch.bfloat16) for x in output)
    assert grads[0].dtype == torch.bfloat16 and {x.dtype for x in grads[1:]} == {weights[0].dtype}
    assert set(made) == {("dan_fast.attention_head_backward.default", torch.bfloat16)}


def test_nl_cbam_reads_half_precision_as_it_lies():
    """No operation makes a map in float32 of the one in half precision."""
    (features, *weights, _), _ = problem(torch.bfloat16)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            assert not (isinstance(made, torch.Tensor) and made.numel() >= features.numel() and made.dtype.itemsize > 2)
            return made

    with Watch():
        refined = functional.nl_cbam(features, NLCBAMWeights(*weights)).refined
        refined.sum().backward()


def test_autocast_takes_half_precision_to_float32():
    inputs, labels = problem(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(inputs, labels)
    assert all(x.dtype == torch.float32 for x in output)


def test_large_gradients_are_memory_of_their_own():
    """Memory that is used for the next gradient is not that of one that is still held."""
    inputs, _ = problem(torch.float32, batch=64, channels=512, size=(7, 7), layout=torch.channels_last)
    labels = torch.arange(64) % 4 - 1
    assert inputs[0].nbytes > 4 << 20
    held = torch.autograd.grad(mixture(head(inputs, labels)), inputs)
    before = [x.clone() for x in held]
    places = set()
    for _ in range(3):
        output = head(inputs, labels)
        grads = torch.autograd.grad(-2 * mixture(output), inputs)
        places.add(grads[0].data_ptr())
        torch.testing.assert_close(grads[0], -2 * before[0], rtol=1e-4, atol=1e-6)
        del grads, output
    assert held[0].data_ptr() not in places
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    # It is a tensor like any other.
    copy = pickle.loads(pickle.dumps(held[0]))
    assert torch.equal(copy, held[0]) and held[0].stride() == inputs[0].stride()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[..., :6],
        lambda x: x[:, :, ::2],
        lambda x: x.mT,
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[:1].expand_as(x),
        lambda x: x.to(memory_format=torch.channels_last)[..., :5, :],
        lambda x: x.flatten().as_strided((24, 600, 7, 7), (49, 24 * 49, 7, 1)),
        lambda x: x.flatten().as_strided((24, 500, 7, 7), (500 * 49, 1, 7, 1)),
    ],
)
def test_large_gradients_of_maps_that_are_not_dense(view):
    """Kept memory is as long as a map without gaps, whatever the strides of the map that the gradient is of."""
    inputs, _ = problem(batch=24, channels=1000, size=(7, 7))
    features = view(inputs[0])
    labels = torch.arange(24) % 4 - 1
    inputs = [features, *problem(channels=features.shape[1], size=features.shape[2:])[0][1:]]
    found = torch.autograd.grad(mixture(head(inputs, labels)), inputs)
    with _extension.disabled():
        expected = torch.autograd.grad(mixture(head(inputs, labels)), inputs)
    assert found[0].untyped_storage().nbytes() == features.numel() * 8 > 4 << 20
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_spreads_as_in_pytorch(value, dtype):
    inputs, labels = problem(dtype, batch=3, channels=9, size=(3, 3))
    with torch.no_grad():
        inputs[0][0, 2, 1, 1] = value
    kernels = head(inputs, labels)
    with _extension.disabled():
        pytorch = head(inputs, labels)
    for actual, expected in zip(kernels, pytorch, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
