"""The attention head: all that the training loss needs of the last map, in one operator.

Its kernels read the map as it lies, once forward: on a GPU it stays in the blocks' shared memory until A_C is known, on
the CPU some samples at a time stay in the cache. Backward it is read once and dX is written once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.core.attention_checks import check_features, check_weights
from dan_fast.core.types import AttentionHeadOutput, NLCBAMWeights
from dan_fast.functional.attention import head_torch
from dan_fast.functional.attention.labels import check_cam_and_labels, marked
from dan_fast.functional.autocast import autocasts, full_precision, widened
from dan_fast.functional.registration import Context, Grads, KernelBackward, Saved, empty_like

_RESULTS = len(AttentionHeadOutput._fields)


def attention_head(features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """All that the training loss needs from the last map, Eqs. (2)-(4), without forming X''.

    attended_c = A_C,c * mean over p of X_cp A_S,p, and the channel mean of X'' is that of X' times A_S.

    Args:
        features: (B, C, H, W) floating, X, in any memory layout.
        weights: the six matrices of NL-CBAM.
        cam_weight: (c, C), the weights of the classifier.
        labels: (B,) int64, the class of each sample, -1 where it is unknown. Any other label raises on the CPU; on a
            GPU, under `torch.compile` and under `torch.vmap`, where the check would wait or is refused, its loss is
            NaN.

    Returns:
        `AttentionHeadOutput(attended (B, C), pooled (B, C), channel_attention (B, C),
        spatial_attention (B, HW), adversary_loss (B,))`; attended and pooled are the spatial means of X'' and
        of X.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, a device or a label that does not fit.

    Example:
        >>> shapes = [(1, 3), (3, 1), (1, 4), (1, 4), (4, 1), (4, 1)]
        >>> weights = NLCBAMWeights(*(torch.zeros(shape) for shape in shapes))
        >>> attention_head(torch.ones(1, 3, 2, 2), weights, torch.ones(5, 3), torch.tensor([-1])).attended
        tensor([[0.2500, 0.2500, 0.2500]])
    """
    check_features("features", features)
    dtype = features.dtype
    if autocasts(features.device.type):
        # The map is read as it is even then; weights and results are wider.
        dtype = torch.promote_types(dtype, torch.float32)
        weights, cam_weight = widened(weights), widened(cam_weight)
    like = features.new_empty((), dtype=dtype).expand(features.shape)
    check_weights(weights, like)
    check_cam_and_labels(cam_weight, labels, like)
    with full_precision(features.device):
        results = AttentionHead.run(features, *widened(weights), widened(cam_weight), labels)
    # They go on with what the operator's backward needs from the passes.
    output = AttentionHeadOutput(*results[:_RESULTS])
    output = output._replace(adversary_loss=marked(output.adversary_loss, labels, cam_weight))
    # The backward holds the operator's own: a caller may change what he gets, as dropout in place does.
    attended, pooled, *maps, losses = output
    output = AttentionHeadOutput(attended.clone(), pooled.clone(), *maps, losses.clone())
    return AttentionHeadOutput(*(value.to(dtype) for value in output))


class HeadSaved(NamedTuple):
    """What the kernels keep of the passes for their backward, beside arguments and results."""

    of_mean: Tensor  # (B, units) wc1 times the spatial mean
    of_peak: Tensor  # (B, units) wc1 times the spatial maximum
    peak: Tensor  # (B, C) spatial maximum
    peak_position: Tensor  # (B, C) int32, its first position
    mean_map: Tensor  # (B, P) mean of X' over channels
    peak_map: Tensor  # (B, P) maximum of X' over channels
    peak_channel: Tensor  # (B, P) int32, its first channel
    adversary_map: Tensor  # (B, P) A_ad


class AttentionHead(KernelBackward):
    """`form` gives an `AttentionHeadOutput`, the kernels then the fields of `HeadSaved` too.

    The arguments are the map (B, C, H, W) in any dtype, the six matrices of NL-CBAM and `cam_weight` in that of
    statistics, and labels.
    """

    name = "attention_head"
    differentiable, constants = 2 + len(NLCBAMWeights._fields), (None,)

    @staticmethod
    def form(features: Tensor, *arguments: Tensor) -> AttentionHeadOutput:
        *weights, cam_weight, labels = arguments
        x = features.flatten(2).to(cam_weight.dtype)
        return head_torch.head(x, NLCBAMWeights(*weights), cam_weight, labels)

    @staticmethod
    def fake(features: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        batch, channels, height, width = features.shape
        wc1, positions = arguments[0], height * width

        def empty(size: int | torch.SymInt, dtype: torch.dtype = wc1.dtype) -> Tensor:
            return wc1.new_empty(batch, size, dtype=dtype)

        results = AttentionHeadOutput(
            attended=empty(channels), pooled=empty(channels), channel_attention=empty(channels),
            spatial_attention=empty(positions), adversary_loss=wc1.new_empty(batch),
        )  # fmt: skip
        kept = HeadSaved(
            of_mean=empty(wc1.shape[0]), of_peak=empty(wc1.shape[0]),
            peak=empty(channels), peak_position=empty(channels, torch.int32),
            mean_map=empty(positions), peak_map=empty(positions), peak_channel=empty(positions, torch.int32),
            adversary_map=empty(positions),
        )  # fmt: skip
        return *results, *kept

    @staticmethod
    def fake_backward(features: Tensor, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        return torch.empty_like(features), *map(empty_like, arguments[: AttentionHead.differentiable - 1])

    @staticmethod
    def setup(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        # What only the backward reads has no gradient: zeros are not made for it.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)

    @classmethod
    def backward(cls, ctx: Context, *grads: Tensor | None) -> tuple:
        return super().backward(ctx, *grads[:_RESULTS])

    @classmethod
    def grad_by_kernel(cls, ctx: Context, saved: Saved, grads: Grads) -> Grads:
        inputs, output = saved[: cls.differentiable + 1], saved[cls.differentiable + 1 :]
        results, kept = AttentionHeadOutput(*output[:_RESULTS]), HeadSaved(*output[_RESULTS:])
        grad = AttentionHeadOutput(*grads)
        # The kernels take these three as tensors, the other two as tensors or nothing.
        grad_attended, grad_spatial_attention, grad_loss = (
            torch.zeros_like(getattr(results, name)) if getattr(grad, name) is None else getattr(grad, name)
            for name in ("attended", "spatial_attention", "adversary_loss")
        )
        return cls.backward_op(
            *inputs, *results[:-1], *kept,
            grad_attended, grad.pooled, grad.channel_attention, grad_spatial_attention, grad_loss,
        )  # fmt: skip
