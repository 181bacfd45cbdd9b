"""The matrix products of the memory, exact in float32 whatever PyTorch's settings say.

A slot is told from another by the last bits of its score. The kernels never round their products below float32;
`torch.set_float32_matmul_precision("high")`, which speeds a network up, must not round those that PyTorch makes beside
them. Backward passes run when the caller asks for them, outside any `with`, and a compiled function decides when it is
traced: so the product is an operator, and its derivatives are the same operator.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dan_fast.core.float32 import exact_float32
from dan_fast.functional.autocast import full_precision
from dan_fast.functional.derivatives import in_transform
from dan_fast.functional.registration import Context, Operator


def product(left: Tensor, right: Tensor, addend: Tensor | None = None) -> Tensor:
    """`left @ right`, plus `addend`, not rounded below float32; differentiable any number of times.

    Args:
        left: (m, k) floating.
        right: (k, n), its dtype.
        addend: (m, n), its dtype.

    Returns:
        (m, n).

    Example:
        >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
        tensor([[11.]])
    """
    if left.dtype == torch.float32:
        return (_Transformable.apply if in_transform() else Float32Product.op)(left, right, addend)
    # Nothing rounds float64.
    return left @ right if addend is None else torch.addmm(addend, left, right)


class Float32Product(Operator):
    # A namespace of its own: `dan_fast` holds the kernels, and this product is PyTorch's.
    namespace, name = "torch_dan_fast", "float32_product"
    schema = "(Tensor left, Tensor right, Tensor? addend) -> Tensor"

    @staticmethod
    def form(left: Tensor, right: Tensor, addend: Tensor | None) -> Tensor:
        # A backward pass runs where the caller asks for it, also inside autocast.
        with full_precision(left.device), exact_float32(left.device.type):
            return torch.mm(left, right) if addend is None else torch.addmm(addend, left, right)

    @staticmethod
    def fake(left: Tensor, right: Tensor, addend: Tensor | None) -> Tensor:
        return left.new_empty(left.shape[0], right.shape[1])

    @staticmethod
    def setup(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, product)


class _Transformable(torch.autograd.Function):
    """`Float32Product` in forward mode, where registered operators lose tangents silently, and in `torch.func`.

    Its form alone would do for both, but PyTorch's derivatives of it round where the caller's settings do.
    """

    generate_vmap_rule = True
    forward = staticmethod(Float32Product.form)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        Float32Product.setup(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Context, left_tangent: Tensor | None, right_tangent: Tensor | None, tangent: Tensor | None) -> Tensor:
        left, right = ctx.saved_tensors
        if left_tangent is not None:
            tangent = _Transformable.apply(left_tangent, right, tangent)
        return tangent if right_tangent is None else _Transformable.apply(left, right_tangent, tangent)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, _Transformable.apply)


def _gradients(ctx: Context, grad: Tensor | None, multiply: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    """Those of left, right and addend, by `multiply`, which is differentiable in its turn."""
    if grad is None:
        return None, None, None
    left, right = ctx.saved_tensors
    grad_left = multiply(grad, right.mT, None) if ctx.needs_input_grad[0] else None
    grad_right = None
    if ctx.needs_input_grad[1]:
        # In the layout of `right`, as PyTorch's own backward has it: of k @ k.mT two gradients of one layout are added.
        turned = right.stride(0) == 1
        grad_right = multiply(grad.mT, left, None).mT if turned else multiply(left.mT, grad, None)
    return grad_left, grad_right, grad if ctx.needs_input_grad[2] else None
