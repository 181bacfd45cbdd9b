"""The attention head over kernels that read the map as it lies: `torch.ops.dan_fast.attention_head`.

X is read twice forward (pooling; then, a sample at a time, all that A_C is needed for), once backward, and dX is
written once. Between the passes lie the small matrix products of Eq. (2). On the CPU all of that is one call in C++; on
a GPU the passes are kernels and the products PyTorch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast import _extension
from dan_fast.functional import attention_torch
from dan_fast.functional.derivatives import through_form
from dan_fast.reference.types import AttentionHeadOutput, NLCBAMWeights

_WEIGHTS, _RESULTS = len(NLCBAMWeights._fields), len(AttentionHeadOutput._fields)


def serves(features: Tensor) -> bool:
    """Whether the kernels take this map."""
    return _extension.serves(features.device.type, features.device.index)


def head(features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """`attention_torch.head` by kernels, of a map (B, C, H, W) in any dtype and the rest in that of statistics."""
    # The operator's results go on with what its backward wants of the passes.
    results = torch.ops.dan_fast.attention_head.default(features, *weights, cam_weight, labels)[:_RESULTS]
    return AttentionHeadOutput(*results)


def passes(
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
    """The operator made of one kernel for each pass, as a GPU runs it."""
    mean, peak, peak_position = torch.ops.dan_fast.head_pool(features)
    of_mean, of_peak = F.linear(mean, wc1), F.linear(peak, wc1)
    # The second layer is linear: one product serves both.
    channel_attention = F.linear(F.relu(of_mean) + F.relu(of_peak), wc2).sigmoid_()
    rows = attention_torch.label_rows(cam_weight, labels)
    attended, spatial_attention, loss, *maps = torch.ops.dan_fast.head_attend(
        features, channel_attention, rows, labels, ws1, ws3, ws2, ws4
    )
    return attended, mean, channel_attention, spatial_attention, loss, of_mean, of_peak, peak, peak_position, *maps


def passes_backward(
    features: Tensor,
    wc1: Tensor,
    wc2: Tensor,
    ws1: Tensor,
    ws3: Tensor,
    ws2: Tensor,
    ws4: Tensor,
    cam_weight: Tensor,
    labels: Tensor,
    attended: Tensor,
    mean: Tensor,
    channel_attention: Tensor,
    spatial_attention: Tensor,
    of_mean: Tensor,
    of_peak: Tensor,
    peak: Tensor,
    peak_position: Tensor,
    mean_map: Tensor,
    peak_map: Tensor,
    peak_channel: Tensor,
    adversary_map: Tensor,
    grad_attended: Tensor,
    grad_pooled: Tensor | None,
    grad_channel_attention: Tensor | None,
    grad_spatial_attention: Tensor,
    grad_loss: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the map, the six weights and the CAM weight, as a GPU computes them."""
    rows = attention_torch.label_rows(cam_weight, labels)
    by_logit, by_rows, by_mean_map, by_peak_map, by_adversary_map, *by_spatial = (
        torch.ops.dan_fast.head_attend_backward(
            features, channel_attention, rows, labels, ws1, ws3, ws2, ws4, attended, spatial_attention, mean_map,
            peak_map, peak_channel, adversary_map, grad_attended, grad_spatial_attention, grad_loss,
        )
    )  # fmt: skip
    if grad_channel_attention is not None:
        by_logit.add_(grad_channel_attention)
    by_logit = torch.ops.aten.sigmoid_backward(by_logit, channel_attention)
    by_hidden = by_logit @ wc2
    by_wc2 = by_logit.mT @ (F.relu(of_mean) + F.relu(of_peak))
    by_of_mean, by_of_peak = (torch.ops.aten.threshold_backward(by_hidden, x, 0) for x in (of_mean, of_peak))
    by_wc1 = torch.addmm(by_of_mean.mT @ mean, by_of_peak.mT, peak)
    by_mean = by_of_mean @ wc1 if grad_pooled is None else torch.addmm(grad_pooled, by_of_mean, wc1)
    by_features = torch.ops.dan_fast.head_features_backward(
        features, channel_attention, rows, spatial_attention, peak_channel, peak_position, grad_attended, by_mean_map,
        by_peak_map, by_adversary_map, by_mean, by_of_peak @ wc1,
    )  # fmt: skip
    # Sorted by class where it is a GPU's: the order of the additions does not change from run to run. The row of a
    # label -1 has gradient 0.
    classes = labels.clamp(0, cam_weight.shape[0] - 1)
    by_cam = torch.zeros_like(cam_weight).index_put_((classes,), by_rows, accumulate=True)
    return by_features, by_wc1, by_wc2, *by_spatial, by_cam


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
    return attention_torch.head(x, NLCBAMWeights(*weights), cam_weight, labels)


if _extension.loaded():
    torch.library.register_kernel("dan_fast::attention_head", "cuda", passes)
    torch.library.register_kernel("dan_fast::attention_head_backward", "cuda", passes_backward)
    torch.library.register_fake("dan_fast::attention_head")(_fake)
    torch.library.register_fake("dan_fast::attention_head_backward")(_fake_backward)
    torch.library.register_autograd("dan_fast::attention_head", _backward, setup_context=_keep)
