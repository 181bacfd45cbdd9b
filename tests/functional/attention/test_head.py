"""The attention operators over their kernels: which path runs, and in what memory. The kernels have their own tests."""

import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dan_fast import _extension, functional
from tests.support.attention_problems import OPERATORS, call, flat_arguments, floating, mixture, problem
from tests.support.toolchain import needs_extension

pytestmark = needs_extension


def arguments(shape=(4, 6, 3, 2), dtype=torch.float64, layout=torch.contiguous_format, name="attention_head"):
    features, *rest = problem(shape, hidden=(3, 2), classes=3, dtype=dtype)
    return flat_arguments(name, features.to(memory_format=layout), *rest)


def head(inputs):
    return call(functional, "attention_head", *inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_kernels_run_once_and_can_be_turned_off(name):
    inputs = arguments(name=name)
    with torch.profiler.profile() as profile:
        mixture(call(functional, name, *inputs)).backward()
        with _extension.disabled():
            plain = call(functional, name, *inputs)
    wanted = {"nl_cbam": ["attention_head", "head_refine"], "attention_adversary": ["head_adversary"]}.get(name, [name])
    names = [event.name for event in profile.events()]
    assert all(names.count(f"dan_fast::{each}{way}") == 1 for each in wanted for way in ("", "_backward"))
    assert "dan_fast" not in str(plain[0].grad_fn)


@pytest.mark.parametrize("name", OPERATORS)
def test_under_activation_checkpointing(name):
    inputs = arguments(name=name)
    output = checkpoint(lambda *x: tuple(call(functional, name, *x)), *inputs, use_reentrant=False)
    plain = call(functional, name, *inputs)
    found, expected = (torch.autograd.grad(mixture(x), floating(inputs)) for x in (output, plain))
    assert all(map(torch.equal, found, expected))


class Made(TorchDispatchMode):
    """Lists the operators that make a tensor of `size` bytes or more, with its dtype."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple) else (results,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.size:
                self.found.add((func.name(), x.dtype))
        return results


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_read_as_it_lies(autocast):
    """No operation makes a map in float32 of the one in half precision, nor another of its gradient."""
    features, *weights, labels = arguments(dtype=torch.bfloat16)
    if autocast:  # as in training, where it meets weights in float32
        weights = [x.detach().float().requires_grad_() for x in weights]
    with Made(features.nbytes) as made:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = head([features, *weights, labels])
        grads = torch.autograd.grad(sum(x.sum() for x in output), [features, *weights])
    assert all(x.dtype == (torch.float32 if autocast else torch.bfloat16) for x in output)
    assert grads[0].dtype == torch.bfloat16 and {x.dtype for x in grads[1:]} == {weights[0].dtype}
    assert made.found == {("dan_fast::attention_head_backward", torch.bfloat16)}


def test_nl_cbam_reads_half_precision_as_it_lies():
    inputs = arguments(dtype=torch.bfloat16, name="nl_cbam")
    with Made(inputs[0].nbytes) as made:
        call(functional, "nl_cbam", *inputs)[0].sum().backward()
    assert {dtype for _, dtype in made.found} == {torch.bfloat16}


def test_large_gradients_are_memory_of_their_own():
    """Memory that is used for the next gradient is not that of one that is still held."""
    inputs = arguments((64, 512, 7, 7), torch.float32, torch.channels_last)
    assert inputs[0].nbytes > 4 << 20
    held = torch.autograd.grad(mixture(head(inputs)), floating(inputs))
    before = [x.clone() for x in held]
    places = set()
    for _ in range(3):
        output = head(inputs)
        grads = torch.autograd.grad(-2 * mixture(output), floating(inputs))
        places.add(grads[0].data_ptr())
        torch.testing.assert_close(grads[0], -2 * before[0], rtol=1e-4, atol=1e-6)
        del grads, output
    assert held[0].data_ptr() not in places
    assert all(map(torch.equal, held, before))
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
    features = view(arguments((24, 1000, 7, 7))[0])
    inputs = [features, *arguments(features.shape)[1:]]
    found = torch.autograd.grad(mixture(head(inputs)), floating(inputs))
    with _extension.disabled():
        expected = torch.autograd.grad(mixture(head(inputs)), floating(inputs))
    assert found[0].untyped_storage().nbytes() == features.numel() * 8 > 4 << 20
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("view", [lambda x: x.mT, lambda x: x[..., ::2], lambda x: x[:, :, ::2]])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_map_without_images_in_any_strides(name, view, device):
    features = view(torch.empty(0, 6, 4, 4, device=device, dtype=torch.float64))
    _, *rest = problem(features.shape, hidden=(3, 2), classes=3)
    given = flat_arguments(name, features, *rest)
    inputs = [x.detach().to(device).requires_grad_(x.is_floating_point()) for x in given]
    assert inputs[0].stride() == features.stride()
    output = call(functional, name, *inputs)
    grads = torch.autograd.grad(mixture(output), floating(inputs))
    assert all(x.shape[0] == 0 for x in output)
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, floating(inputs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_spreads_as_in_pytorch(value, dtype):
    inputs = arguments((3, 9, 3, 3), dtype)
    with torch.no_grad():
        inputs[0][0, 2, 1, 1] = value
    kernels = head(inputs)
    with _extension.disabled():
        pytorch = head(inputs)
    torch.testing.assert_close(kernels, pytorch, rtol=1e-4, atol=1e-5, equal_nan=True)
