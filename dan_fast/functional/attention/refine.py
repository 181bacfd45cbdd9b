"""NL-CBAM: X'' = X A_C A_S, which the attention head never forms.

The kernels read the map as it lies, once forward and once backward, and write each result of its size once.
"""

import torch
from torch import Tensor

from dan_fast.core.attention_checks import check_features, check_weights
from dan_fast.core.types import NLCBAMOutput, NLCBAMWeights
from dan_fast.functional.attention.head import AttentionHead
from dan_fast.functional.attention.head_torch import weighted_channel_sum
from dan_fast.functional.autocast import outside_autocast, widened
from dan_fast.functional.registration import Context, Grads, KernelBackward, Saved


@outside_autocast
def nl_cbam(features: Tensor, weights: NLCBAMWeights) -> NLCBAMOutput:
    """Channel attention, then non-local spatial attention, Eqs. (2)-(3).

    Args:
        features: (B, C, H, W) floating, the last map X of the backbone, in any memory layout.
        weights: the six matrices, of the dtype and device of `features`.

    Returns:
        `NLCBAMOutput(refined (B, C, H, W), channel_attention (B, C), spatial_attention (B, HW))`,
        differentiable any number of times; `refined` has the layout of `features`, and the gradient of a max
        goes to its first maximum.

    Raises:
        TypeError: an argument that is not floating or whose dtype differs from that of `features`.
        ValueError: a shape or device that does not fit.

    Example:
        >>> shapes = [(1, 3), (3, 1), (1, 4), (1, 4), (4, 1), (4, 1)]
        >>> weights = NLCBAMWeights(*(torch.zeros(shape) for shape in shapes))
        >>> nl_cbam(torch.ones(1, 3, 2, 2), weights).spatial_attention
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    check_features("features", features)
    check_weights(weights, features)
    wide = widened(weights)
    # Without labels the head is NL-CBAM.
    no_cam = wide.wc1.new_zeros(1, features.shape[1])
    unknown = torch.full((features.shape[0],), -1, device=features.device)
    channel_attention, spatial_attention = AttentionHead.run(features, *wide, no_cam, unknown)[2:4]
    return NLCBAMOutput(
        refined=HeadRefine.run(features, channel_attention, spatial_attention),
        channel_attention=channel_attention.to(features.dtype),
        spatial_attention=spatial_attention.to(features.dtype),
    )


class HeadRefine(KernelBackward):
    """X'' in the dtype and layout of X (B, C, H, W), from attentions in the dtype of statistics."""

    name = "head_refine"
    differentiable = 3

    @staticmethod
    def form(features: Tensor, channel_attention: Tensor, spatial_attention: Tensor) -> Tensor:
        x = features.flatten(2).to(channel_attention.dtype)
        refined = x * channel_attention.unsqueeze(2) * spatial_attention.unsqueeze(1)
        return refined.unflatten(2, features.shape[2:]).to(features.dtype)

    @staticmethod
    def fake(features: Tensor, channel_attention: Tensor, spatial_attention: Tensor) -> Tensor:
        return torch.empty_like(features)

    @staticmethod
    def fake_backward(
        features: Tensor, channel_attention: Tensor, spatial_attention: Tensor, grad: Tensor
    ) -> tuple[Tensor, ...]:
        attentions = (x.new_empty(x.shape) for x in (channel_attention, spatial_attention))
        return torch.empty_like(features), *attentions

    @classmethod
    def grad_by_form(cls, ctx: Context, saved: Saved, grads: Grads) -> Grads:
        # Written out: autograd through the form would keep two maps more.
        (features, channel_attention, spatial_attention), (grad,) = saved, grads
        product = features.flatten(2).to(channel_attention.dtype) * grad.flatten(2)
        grad_channel_attention = (product @ spatial_attention.unsqueeze(2)).squeeze(2)
        grad_spatial_attention = weighted_channel_sum(product, channel_attention)
        return cls.form(grad, channel_attention, spatial_attention), grad_channel_attention, grad_spatial_attention
