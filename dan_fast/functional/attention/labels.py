"""Labels of samples, of which some are unknown and some may be no class at all."""

import torch
from torch import Tensor

from dan_fast.core.attention_checks import check_cam, check_label_values
from dan_fast.core.checks import may_look_at


def check_cam_and_labels(cam_weight: Tensor, labels: Tensor, features: Tensor) -> None:
    """`check_cam`, and `check_label_values` where that is free."""
    check_cam(cam_weight, labels, features)
    if may_look_at(labels):
        check_label_values(cam_weight, labels)


def marked(loss: Tensor, labels: Tensor, cam_weight: Tensor) -> Tensor:
    """The loss, NaN for a label that is no class where `check_cam_and_labels` could not look at the labels."""
    if may_look_at(labels):
        return loss
    return loss.masked_fill((labels < -1) | (labels >= cam_weight.shape[0]), torch.nan)
