"""The attention head over kernels that read the map as it lies: `torch.ops.dan_fast.attention_head`.

X is read twice forward (pooling; then, a sample at a time, all that A_C is needed for), once backward, and dX is
written once. Between the passes lie the small matrix products of Eq. (2), which are PyTorch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast import _extension
from dan_fast.functional import attention_torch
from dan_fast.reference.types import AttentionHeadOutput, NLCBAMWeights

_WEIGHTS, _RESULTS = len(NLCBAMWeights._fields), len(AttentionHeadOutput._fields)


def serves(features: Tensor) -> bool:
    """Whether the kernels take this map."""
    return _extension.serves(features.device.type, features.device.index)


def head(features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """`attention_torch.head` by kernels, of a map (B, C, H, W) in any dtype and the rest in that of statistics."""
    return AttentionHeadOutput(*_forward(features, *weights, cam_weight, labels)[:_RESULTS])


@torch.library.custom_op("dan_fast::attention_head", mutates_args=())
def _forward(
    features: Tensor,
    wc1: Tensor,
    wc2: Tensor,
    ws1: Tensor,
    ws3: Tensor,
    ws2: Tensor,
    ws4: Tensor,
    cam_weight: Tensor,
    labels: Tensor,
) -> list[Tensor]:
    """The five results, then what the backward wants of the passes."""
    mean, peak, peak_position = torch.ops.dan_fast.head_pool(features)
    of_mean, of_peak = F.linear(mean, wc1), F.linear(peak, wc1)
    # The second layer is linear: one product serves both.
    channel_attention = F.linear(F.relu(of_mean) + F.relu(of_peak), wc2).sigmoid_()
    rows = attention_torch.label_rows(cam_weight, labels)
    attended, spatial_attention, loss, *maps = torch.ops.dan_fast.head_attend(
        features, channel_attention, rows, labels, ws1, ws3, ws2, ws4
    )
    return [
        attended,
        mean,
        channel_attention,
        spatial_attention,
        loss,
        of_mean,
        of_peak,
        peak,
        peak_position,
        rows,
        *maps,
    ]


@_forward.register_fake
def _(
    features: Tensor,
    wc1: Tensor,
    wc2: Tensor,
    ws1: Tensor,
    ws3: Tensor,
    ws2: Tensor,
    ws4: Tensor,
    cam_weight: Tensor,
    labels: Tensor,
) -> list[Tensor]:
    batch, channels, height, width = features.shape
    of_channels, of_map = wc1.new_empty(batch, channels), wc1.new_empty(batch, height * width)
    where = [x.new_empty(x.shape, dtype=torch.int32) for x in (of_channels, of_map)]
    like = torch.empty_like
    results = [of_channels, like(of_channels), like(of_channels), of_map, wc1.new_empty(batch)]
    of_pooled = [wc1.new_empty(batch, wc1.shape[0]) for _ in range(2)]
    maps = [like(of_map), like(of_map), where[1], like(of_map)]
    return [*results, *of_pooled, like(of_channels), where[0], like(of_channels), *maps]


@torch.library.custom_op("dan_fast::attention_head_backward", mutates_args=())
def _backward_op(
    features: Tensor,
    weights: list[Tensor],
    cam_weight: Tensor,
    labels: Tensor,
    output: list[Tensor],
    grads: list[Tensor],
) -> list[Tensor]:
    """Gradients of the map, the six weights and the CAM weight, from those of the five results."""
    wc1, wc2, *spatial = weights
    attended, mean, channel_attention, spatial_attention, _, of_mean, of_peak, peak, peak_position, rows, *maps = output
    peak_channel = maps[2]
    grad_attended, grad_pooled, grad_channel_attention, grad_spatial_attention, grad_loss = grads
    by_logit, by_rows, by_mean_map, by_peak_map, by_adversary_map, *by_spatial = (
        torch.ops.dan_fast.head_attend_backward(
            features, channel_attention, rows, labels, *spatial, attended, spatial_attention, *maps,
            grad_attended, grad_spatial_attention, grad_loss,
        )
    )  # fmt: skip
    by_logit = torch.ops.aten.sigmoid_backward(by_logit.add_(grad_channel_attention), channel_attention)
    by_hidden = by_logit @ wc2
    by_wc2 = by_logit.mT @ (F.relu(of_mean) + F.relu(of_peak))
    by_of_mean, by_of_peak = by_hidden * (of_mean > 0), by_hidden * (of_peak > 0)
    by_wc1 = torch.addmm(by_of_mean.mT @ mean, by_of_peak.mT, peak)
    by_features = torch.ops.dan_fast.head_features_backward(
        features, channel_attention, rows, spatial_attention, peak_channel, peak_position, grad_attended, by_mean_map,
        by_peak_map, by_adversary_map, torch.addmm(grad_pooled, by_of_mean, wc1), by_of_peak @ wc1,
    )  # fmt: skip
    # Sorted by class where it is a GPU's: the order of the additions does not change from run to run. The row of a
    # label -1 has gradient 0.
    classes = labels.clamp(0, cam_weight.shape[0] - 1)
    by_cam = torch.zeros_like(cam_weight).index_put_((classes,), by_rows, accumulate=True)
    return [by_features, by_wc1, by_wc2, *by_spatial, by_cam]


@_backward_op.register_fake
def _(
    features: Tensor,
    weights: list[Tensor],
    cam_weight: Tensor,
    labels: Tensor,
    output: list[Tensor],
    grads: list[Tensor],
) -> list[Tensor]:
    return [torch.empty_like(features), *(torch.empty_like(x) for x in (*weights, cam_weight))]


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: torch.autograd.function.FunctionCtx, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at every asking
    inputs, output = saved[: _WEIGHTS + 3], saved[_WEIGHTS + 3 :]
    features, *weights, cam_weight, labels = inputs
    if torch.is_grad_enabled():
        # For whoever differentiates the gradients: a kernel would cut the second derivative off.
        x = features.flatten(2).to(wide := weights[0].dtype)
        results = attention_torch.head(x, NLCBAMWeights(*weights), cam_weight, labels)
        wanted = [i for i in range(_WEIGHTS + 2) if ctx.needs_input_grad[i]]
        # What depends on none of the wanted has no gradient to give.
        live = [(y, g.to(wide)) for y, g in zip(results, grads, strict=False) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in live],
            [inputs[i] for i in wanted],
            [g for _, g in live],
            create_graph=True,
            allow_unused=True,
        )
        by_input: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(wanted, found, strict=True):
            by_input[i] = gradient
        return tuple(by_input)
    return *_backward_op(features, weights, cam_weight, labels, list(output), list(grads[:_RESULTS])), None


_forward.register_autograd(_backward, setup_context=_keep)
