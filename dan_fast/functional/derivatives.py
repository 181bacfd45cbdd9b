"""Gradients that can be differentiated again: where a kernel would cut the second derivative off, autograd goes
through an operator's PyTorch form."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.module_tracker import ModuleTracker


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents (`torch.func.jvp`, `forward_ad.dual_level`): kernels have no rule for them."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether tensors may be more than their numbers: in forward mode, or in a transform of `torch.func`.

    PyTorch has no rule by which the autograd of a registered operator takes part in `grad`, `vjp`, `jacrev` or `vmap`.
    """
    return in_forward_mode() or torch._C._are_functorch_transforms_active()


def in_backward_pass() -> bool:
    """Whether this thread runs a backward pass, as activation checkpointing does when it computes a part again."""
    # Of a tracker that has not been entered this is all that can be asked.
    return ModuleTracker().is_bw


def carry_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether any of them, None left out, carries a tangent."""
    return in_forward_mode() and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def without_graph(value: Tensor | None) -> Tensor | None:
    """A value and its tangent, if it carries one, as constants."""
    if value is None:
        return None
    primal, tangent = forward_ad.unpack_dual(value)
    return primal.detach() if tangent is None else forward_ad.make_dual(primal.detach(), tangent.detach())


def through_form(
    form: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of an operator's inputs as functions of these and of the results' gradients.

    Each is the input's own share only, also where one input is made from another or is the same tensor: what comes by
    way of the others is autograd's to add.

    Args:
        form: the operator in PyTorch, of `inputs` in their order.
        inputs: as they were saved, with their history.
        needed: which of them require a gradient; missing ones do not.
        grads: of the results, None where nothing depends on one.
    """
    views = [x.view_as(x) for x in inputs]
    results = zip(form(*views), grads, strict=True)
    # What depends on none of the inputs has no gradient to give.
    live = [(y, grad.to(y.dtype)) for y, grad in results if grad is not None and y.requires_grad]
    wanted = [i for i in range(len(inputs)) if i < len(needed) and needed[i]]
    gradients: list[Tensor | None] = [None] * len(inputs)
    if not live or not wanted:
        return gradients
    found = torch.autograd.grad(
        [y for y, _ in live],
        [views[i] for i in wanted],
        [grad for _, grad in live],
        create_graph=True,
        allow_unused=True,
    )
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients
