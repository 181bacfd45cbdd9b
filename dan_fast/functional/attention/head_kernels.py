"""The attention head over kernels that read the map as it lies: `torch.ops.dan_fast.attention_head`.

One call each way. X comes from memory once forward: on a GPU it stays in the blocks' shared memory until A_C is known,
on the CPU some samples at a time stay in the cache. Backward it is read once and dX is written once.
"""

import torch
from torch import Tensor

from dan_fast import _extension
from dan_fast.core.types import AttentionHeadOutput, NLCBAMWeights
from dan_fast.functional.attention import head_torch
from dan_fast.functional.derivatives import through_form

_WEIGHTS, _RESULTS = len(NLCBAMWeights._fields), len(AttentionHeadOutput._fields)


def serves(features: Tensor) -> bool:
    """Whether the kernels take this map."""
    return _extension.serves(features.device.type, features.device.index)


def head(features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """`head_torch.head` by kernels, of a map (B, C, H, W) in any dtype and the rest in that of statistics."""
    # The operator's results go on with what its backward wants of the passes.
    results = torch.ops.dan_fast.attention_head.default(features, *weights, cam_weight, labels)[:_RESULTS]
    return AttentionHeadOutput(*results)


def _fake(
    features: Tensor,
    wc1: Tensor,
    wc2: Tensor,
    ws1: Tensor,
    ws3: Tensor,
    ws2: Tensor,
    ws4: Tensor,
    cam_weight: Tensor,
    labels: Tensor,
) -> tuple[Tensor, ...]:
    batch, channels, height, width = features.shape

    def empty(size: int | torch.SymInt, dtype: torch.dtype = wc1.dtype) -> Tensor:
        return wc1.new_empty(batch, size, dtype=dtype)

    positions, units = height * width, wc1.shape[0]
    results = empty(channels), empty(channels), empty(channels), empty(positions), wc1.new_empty(batch)
    pooled = empty(units), empty(units), empty(channels), empty(channels, torch.int32)
    return *results, *pooled, empty(positions), empty(positions), empty(positions, torch.int32), empty(positions)


def _fake_backward(features: Tensor, *arguments: Tensor | None) -> tuple[Tensor, ...]:
    of_weights = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[: _WEIGHTS + 1])
    return torch.empty_like(features), *of_weights


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    # Nobody asks for the gradients of what only the backward reads.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at every asking
    inputs, output = saved[: _WEIGHTS + 3], saved[_WEIGHTS + 3 :]
    if torch.is_grad_enabled():
        return tuple(through_form(_form, inputs, ctx.needs_input_grad, grads[:_RESULTS]))
    attended, pooled, channel_attention, spatial_attention, loss = grads[:_RESULTS]

    def or_zeros(grad: Tensor | None, of: Tensor) -> Tensor:
        return torch.zeros_like(of) if grad is None else grad

    results = AttentionHeadOutput(*output[:_RESULTS])
    gradients = torch.ops.dan_fast.attention_head_backward.default(
        *inputs,
        *results[:-1],
        *output[_RESULTS:],
        or_zeros(attended, results.attended),
        pooled,
        channel_attention,
        or_zeros(spatial_attention, results.spatial_attention),
        or_zeros(loss, results.adversary_loss),
    )
    return *gradients, None


def _form(features: Tensor, *arguments: Tensor) -> AttentionHeadOutput:
    *weights, cam_weight, labels = arguments
    x = features.flatten(2).to(cam_weight.dtype)
    return head_torch.head(x, NLCBAMWeights(*weights), cam_weight, labels)


if _extension.loaded():
    torch.library.register_fake("dan_fast::attention_head")(_fake)
    torch.library.register_fake("dan_fast::attention_head_backward")(_fake_backward)
    torch.library.register_autograd("dan_fast::attention_head", _backward, setup_context=_keep)
