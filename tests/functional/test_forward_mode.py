"""Tangents through the operators: no kernel has a rule for them, and none may lose one without an error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp

from dan_fast.functional import cosine_softmax, discriminative_loss
from dan_fast.functional.memory.softmax import SlotSoftmax
from dan_fast.functional.products import product
from tests.support.draws import draw

LABELS = torch.arange(6) % 3


def slots(dtype: torch.dtype) -> Tensor:
    return draw(6, 5, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_tangent_of_half_precision_slots_goes_through(dtype: torch.dtype):
    keys, start, along = draw(7, 5, dtype=dtype), slots(dtype), draw(6, 5, dtype=dtype, seed=3)

    def weights(x: Tensor) -> Tensor:
        return cosine_softmax(keys.to(x.dtype), x)

    def losses(x: Tensor) -> Tensor:
        return discriminative_loss(keys.to(x.dtype), torch.arange(7) % 3, x, LABELS, 0.5)

    for function in (weights, losses):
        exact = jvp(function, (start.double(),), (along.double(),))[1]
        assert exact.abs().max() > 0.05
        torch.testing.assert_close(jvp(function, (start,), (along,))[1].double(), exact, rtol=1e-4, atol=1e-5)
        whole = (jacfwd(function)(start).double() * along.double()).sum((-2, -1))
        torch.testing.assert_close(whole, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: cosine_softmax(x, slots(x.dtype)),
        lambda x: SlotSoftmax.run(x, x.new_full((5,), 9.0), x.new_full((7,), 9.0), None),
    ],
    ids=["cosine_softmax", "slot_softmax"],
)
def test_the_tangent_of_a_gradient_goes_through_a_backward_pass(function: Callable[..., Tensor], dtype: torch.dtype):
    """Of a graph that was made before there were tangents."""
    given = draw(7, 5, dtype=dtype).requires_grad_()
    result = function(given)
    along = draw(*result.shape, dtype=dtype, seed=4)
    (expected,) = torch.autograd.grad(result, given, along, retain_graph=True)
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(result, given, forward_ad.make_dual(torch.ones_like(along), along))
        primal, tangent = forward_ad.unpack_dual(found)
    assert not primal.requires_grad and not tangent.requires_grad
    torch.testing.assert_close(tangent, expected)


PRODUCTS = {
    "left": lambda multiply, x: multiply(x, x.detach().mT.sin(), None),
    "right": lambda multiply, x: multiply(x.detach().sin(), x, None),
    "addend": lambda multiply, x: multiply(x.detach(), x.detach(), x * 2),
    "all": lambda multiply, x: multiply(multiply(x, x.mT, None).tanh(), x, x),
}


@pytest.mark.parametrize("form", PRODUCTS)
def test_derivatives_of_derivatives_of_a_product(form: str):
    def plain(left: Tensor, right: Tensor, addend: Tensor | None) -> Tensor:
        return left @ right if addend is None else left @ right + addend

    def derivatives(multiply: Callable[..., Tensor]) -> list[Tensor]:
        def loss(y: Tensor) -> Tensor:
            return PRODUCTS[form](multiply, y).sin().square().sum()

        def slope(y: Tensor) -> Tensor:
            return jvp(loss, (y,), (along,))[1]

        forward_twice = jvp(slope, (x,), (along,))[1]
        return [slope(x), forward_twice, grad(slope)(x), jacfwd(loss)(x), jacfwd(grad(slope))(x)]

    x, along = draw(4, 4, seed=5), draw(4, 4, seed=6)
    torch.testing.assert_close(derivatives(product), derivatives(plain), rtol=1e-4, atol=1e-4)
