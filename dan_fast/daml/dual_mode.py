"""What a trunk needs to run with tangents, beside PyTorch's forward mode: a faster batch norm, and constants.

PyTorch composes both derivatives of batch norm of elementwise operators, which is half of the time of forward over
reverse through a ResNet. They can be had from the two kernels that batch norm has anyway: the Jacobian of the
normalised map by the map is symmetric, so the kernel of the backward pass applies it to a tangent as to a gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_native = torch.ops.aten.native_batch_norm.default
_native_backward = torch.ops.aten.native_batch_norm_backward.default


class DualMode(TorchFunctionMode):
    """Inside, batch norm is the one of this module, and what is computed without gradients carries no tangent.

    PyTorch's forward mode goes through `torch.no_grad()`, reverse mode does not: the two would differ.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.data.__get__:
            return args[0].detach()
        if torch.is_grad_enabled():
            result = (_batch_norm if func is F.batch_norm else func)(*args, **kwargs)
            constant = func is torch.autograd.grad and not kwargs.get("create_graph")
        elif torch.is_inference_mode_enabled() or getattr(func, "__name__", "") in _OF_THE_TENSOR_ITSELF:
            result, constant = func(*args, **kwargs), True
        else:
            return _by_constants(func, args, kwargs)
        return tree_map_only(Tensor, Tensor.detach, result) if constant else result


# Attributes, and methods that ask or change what a tensor is beside its numbers.
_OF_THE_TENSOR_ITSELF = {
    *("__get__", "__set__", "__delete__", "requires_grad_", "retain_grad", "register_hook", "detach_"),
}


def _by_constants(func: Any, args: tuple, kwargs: dict) -> Any:
    """`func` of tensors without tangents; one that it changes in place keeps its own, as it keeps its gradient."""
    given: dict[int, tuple[Tensor, Tensor]] = {}

    def constant(tensor: Tensor) -> Tensor:
        detached = tensor.detach()
        given[id(detached)] = detached, tensor
        return detached

    result = func(*tree_map_only(Tensor, constant, args), **tree_map_only(Tensor, constant, kwargs))
    return tree_map_only(Tensor, lambda found: given.get(id(found), (found, found))[1], result)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    plain = running_mean is None and weight is not None and bias is not None and weight.dtype == input.dtype
    if training and plain and weight.dtype in (torch.float32, torch.float64):
        return _Norm.apply(input, weight, bias, eps)[0]
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


class _Norm(torch.autograd.Function):
    """(y, mean, s) of x (N, C, ...), s being 1 / deviation: y = weight n + bias, n = s (x - mean)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return _native(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.save_for_forward(x, weight, mean, scale)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *_Grad.apply(grad, *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def jvp(ctx: FunctionCtx, tangent: Tensor, weight_tangent: Tensor, bias_tangent: Tensor, _: None) -> tuple:
        x, weight, mean, scale = ctx.saved_tensors
        moved = _native_backward(tangent, x, weight, None, None, mean, scale, True, ctx.eps, [True, False, False])[0]
        variance = scale.pow(-2) - ctx.eps
        moved += _native(x, weight_tangent, bias_tangent, mean, variance, False, 0.0, ctx.eps)[0]
        return moved, None, None


class _Grad(torch.autograd.Function):
    """(grad_x, grad_weight, grad_bias) of `_Norm`: grad_x = weight s (g - mean(g) - n mean(g n))."""

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _native_backward(grad, x, weight, None, None, mean, scale, True, eps, [True, True, True])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        grad, x, weight, mean, scale, ctx.eps = inputs
        _, grad_weight, grad_bias = output
        ctx.save_for_forward(grad, x, weight, mean, scale, grad_weight, grad_bias)

    @staticmethod
    def jvp(ctx: FunctionCtx, grad_tangent: Tensor, tangent: Tensor, weight_tangent: Tensor, *_: None) -> tuple:
        grad, x, weight, mean, scale, grad_weight, grad_bias = ctx.saved_tensors
        count = x.numel() // x.shape[1]

        def backward(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, mask: list[bool]) -> tuple:
            return _native_backward(grad, x, weight, None, None, mean, scale, True, ctx.eps, mask)

        moved, weight_moved, bias_moved = backward(grad_tangent, x, mean, scale, [True, True, True])
        # Means over the samples of a channel, of g n, g, t n, t, g t and g n's tangent, t being the tangent of x.
        gn, g = grad_weight / count, grad_bias / count
        tn, t = (each / count for each in backward(tangent, x, mean, scale, [False, True, True])[1:])
        gt = backward(grad, tangent, torch.zeros_like(mean), torch.ones_like(scale), [False, True, False])[1] / count
        gd = scale * (gt - g * t - gn * tn)
        outer = weight_tangent - weight * scale * tn
        by_n = scale * (weight * scale * gn * tn - outer * gn - weight * gd)
        constant = scale * (weight * scale * gn * t - outer * g) - by_n * scale * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        moved.addcmul_(grad, (outer * scale).view(shape))
        moved.addcmul_(tangent, (weight * scale.square() * -gn).view(shape))
        moved.addcmul_(x, (by_n * scale).view(shape)).add_(constant.view(shape))
        return moved, weight_moved + count * gd, bias_moved
