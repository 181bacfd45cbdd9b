"""The attention adversary of given maps X and X'', Eq. (4)."""

import torch
from torch import Tensor

from dan_fast.core.attention_checks import check_features, check_refined
from dan_fast.core.types import AdversaryOutput
from dan_fast.functional.attention.head_torch import adversary_loss, label_rows, weighted_channel_sum, where_known
from dan_fast.functional.attention.labels import check_cam_and_labels, marked
from dan_fast.functional.autocast import outside_autocast, widened
from dan_fast.functional.registration import Context, Grads, KernelBackward, Saved, empty_like


@outside_autocast
def attention_adversary(features: Tensor, refined: Tensor, cam_weight: Tensor, labels: Tensor) -> AdversaryOutput:
    """The attention adversary difference loss L_aad between A_at and the class activation map A_ad, Eq. (4).

    Args:
        features: (B, C, H, W) floating, X.
        refined: (B, C, H, W), X'' = X * A_C * A_S.
        cam_weight: (c, C), the weights of the classifier.
        labels: (B,) int64, the class of each sample, -1 where it is unknown. Any other label raises on the CPU; on a
            GPU, under `torch.compile` and under `torch.vmap`, where the check would wait or is refused, its loss is
            NaN.

    Returns:
        `AdversaryOutput(loss (B,), refined_map (B, HW), adversary_map (B, HW))`. Where the label is -1 the
        loss and the adversary's map are 0 and carry no gradient. The gradient of |A_at - A_ad| at 0 is 0.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, a device or a label that does not fit.

    Example:
        >>> x = torch.zeros(1, 3, 2, 2)
        >>> attention_adversary(x, x, torch.ones(5, 3), torch.tensor([4])).loss
        tensor([1.])
    """
    check_features("features", features)
    check_refined(refined, features)
    check_cam_and_labels(cam_weight, labels, features)
    output = AdversaryOutput(*HeadAdversary.run(features, refined, label_rows(widened(cam_weight), labels), labels))
    output = output._replace(loss=marked(output.loss, labels, cam_weight))
    return AdversaryOutput(*(value.to(features.dtype) for value in output))


class HeadAdversary(KernelBackward):
    """An `AdversaryOutput` of two maps (B, C, H, W) and the classifier's row of each label, (B, C) in the dtype of
    statistics.

    The gradient of X'' is the same in all channels and is an expanded view.
    """

    name = "head_adversary"
    differentiable, constants = 3, (None,)

    @staticmethod
    def form(features: Tensor, refined: Tensor, rows: Tensor, labels: Tensor) -> AdversaryOutput:
        refined_map = refined.flatten(2).to(rows.dtype).mean(dim=1)
        adversary_map = where_known(weighted_channel_sum(features.flatten(2).to(rows.dtype), rows), labels)
        return AdversaryOutput(adversary_loss(refined_map, adversary_map, labels), refined_map, adversary_map)

    @staticmethod
    def fake(features: Tensor, refined: Tensor, rows: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        batch, _, height, width = features.shape
        refined_map, adversary_map = (rows.new_empty(batch, height * width) for _ in range(2))
        return rows.new_empty(batch), refined_map, adversary_map

    @staticmethod
    def fake_backward(features: Tensor, rows: Tensor, labels: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        batch, _, height, width = features.shape
        return torch.empty_like(features), rows.new_empty(batch, height * width), empty_like(rows)

    @staticmethod
    def setup(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        # No map of zeros for X''; what comes back to a small result may be made where it is missing.
        ctx.set_materialize_grads(False)
        _, refined_map, adversary_map = output
        ctx.save_for_backward(*inputs, refined_map, adversary_map)

    @classmethod
    def grad_by_kernel(cls, ctx: Context, saved: Saved, grads: Grads) -> Grads:
        features, refined, rows, labels, refined_map, adversary_map = saved
        grad_loss, *grad_maps = grads
        grad_loss = rows.new_zeros(rows.shape[0]) if grad_loss is None else grad_loss
        grad_maps = [torch.zeros_like(refined_map) if grad is None else grad for grad in grad_maps]
        grad_features, grad_refined_map, grad_rows = cls.backward_op(
            features, rows, labels, refined_map, adversary_map, grad_loss, *grad_maps
        )
        batch, channels, height, width = refined.shape
        grad_refined = (grad_refined_map / channels).to(refined.dtype).view(batch, 1, height, width)
        return grad_features, grad_refined.expand_as(refined), grad_rows
