"""X'' and the attention adversary of given maps, which the attention head never forms; by kernels where there are any.

A map is read as it lies, once forward and once backward, and each result of its size is written once. The gradient of
X'' that comes from the adversary is the same in all channels and is an expanded view.
"""

import torch
from torch import Tensor

from dan_fast import _extension
from dan_fast.core.types import AdversaryOutput
from dan_fast.functional.attention.head_kernels import serves
from dan_fast.functional.attention.head_torch import adversary_loss, weighted_channel_sum
from dan_fast.functional.derivatives import through_form


def refine(features: Tensor, channel_attention: Tensor, spatial_attention: Tensor) -> Tensor:
    """X'' = X A_C A_S in the dtype and layout of X (B, C, H, W), from attentions in the dtype of statistics."""
    if serves(features):
        return torch.ops.dan_fast.head_refine.default(features, channel_attention, spatial_attention)
    return _refine_torch(features, channel_attention, spatial_attention)


def adversary(features: Tensor, refined: Tensor, rows: Tensor, labels: Tensor) -> AdversaryOutput:
    """Eq. (4) of two maps (B, C, H, W) and the classifier's row of each label, (B, C) in the dtype of statistics."""
    if serves(features):
        return AdversaryOutput(*torch.ops.dan_fast.head_adversary.default(features, refined, rows, labels))
    return _adversary_torch(features, refined, rows, labels)


def _refine_torch(x: Tensor, channel_attention: Tensor, spatial_attention: Tensor) -> Tensor:
    wide = x.flatten(2).to(channel_attention.dtype) * channel_attention.unsqueeze(2) * spatial_attention.unsqueeze(1)
    return wide.unflatten(2, x.shape[2:]).to(x.dtype)


def _adversary_torch(features: Tensor, refined: Tensor, rows: Tensor, labels: Tensor) -> AdversaryOutput:
    refined_map = refined.flatten(2).to(rows.dtype).mean(dim=1)
    adversary_map = weighted_channel_sum(features.flatten(2).to(rows.dtype), rows)
    return AdversaryOutput(adversary_loss(refined_map, adversary_map, labels), refined_map, adversary_map)


def _keep_refine(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _refine_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    features, channel_attention, spatial_attention = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return torch.ops.dan_fast.head_refine_backward.default(features, channel_attention, spatial_attention, grad)
    # For whoever differentiates the gradients: a kernel would cut the second derivative off.
    product = features.flatten(2).to(channel_attention.dtype) * grad.flatten(2)
    by_channel_attention = (product @ spatial_attention.unsqueeze(2)).squeeze(2)
    by_spatial_attention = weighted_channel_sum(product, channel_attention)
    return _refine_torch(grad, channel_attention, spatial_attention), by_channel_attention, by_spatial_attention


def _keep_adversary(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    # No map of zeros for X''; what comes back to a small result may be made where it is missing.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _adversary_backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    features, refined, rows, labels, refined_map, adversary_map = ctx.saved_tensors
    if all(grad is None for grad in grads):
        return None, None, None, None
    if torch.is_grad_enabled():
        return tuple(through_form(_adversary_torch, (features, refined, rows, labels), ctx.needs_input_grad, grads))
    by_loss, *by_maps = grads
    by_loss = rows.new_zeros(rows.shape[0]) if by_loss is None else by_loss
    by_maps = [torch.zeros_like(refined_map) if grad is None else grad for grad in by_maps]
    by_features, by_refined_map, by_rows = torch.ops.dan_fast.head_adversary_backward.default(
        features, rows, labels, refined_map, adversary_map, by_loss, *by_maps
    )
    batch, channels, height, width = refined.shape
    by_refined = (by_refined_map / channels).to(refined.dtype).view(batch, 1, height, width)
    return by_features, by_refined.expand_as(refined), by_rows, None


def _fake_adversary(features: Tensor, refined: Tensor, rows: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    batch, _, height, width = features.shape
    maps = [rows.new_empty(batch, height * width) for _ in range(2)]
    return rows.new_empty(batch), *maps


def _fake_adversary_backward(features: Tensor, rows: Tensor, labels: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    batch, _, height, width = features.shape
    return torch.empty_like(features), rows.new_empty(batch, height * width), rows.new_empty(rows.shape)


if _extension.loaded():
    torch.library.register_fake("dan_fast::head_refine")(
        lambda features, channel_attention, spatial_attention: torch.empty_like(features)
    )
    torch.library.register_fake("dan_fast::head_refine_backward")(
        lambda features, channel_attention, spatial_attention, grad: (
            torch.empty_like(features),
            channel_attention.new_empty(channel_attention.shape),
            spatial_attention.new_empty(spatial_attention.shape),
        )
    )
    torch.library.register_fake("dan_fast::head_adversary")(_fake_adversary)
    torch.library.register_fake("dan_fast::head_adversary_backward")(_fake_adversary_backward)
    torch.library.register_autograd("dan_fast::head_refine", _refine_backward, setup_context=_keep_refine)
    torch.library.register_autograd("dan_fast::head_adversary", _adversary_backward, setup_context=_keep_adversary)
