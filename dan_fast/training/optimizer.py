"""The outer SGD and the step sizes of its groups."""

import torch
from torch import nn

from dan_fast.training.config import OptimizerConfig

_BACKBONE = "network.backbone."
# Key of an optimizer's group: the factor on its step size.
_SCALE = "lr_scale"


def build_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.SGD:
    """SGD over a `TrainingModel`, in one group unless the backbone's steps are scaled; `set_step_size` comes next."""
    named, scale = list(model.named_parameters()), settings.backbone_lr_scale
    backbone = [parameter for name, parameter in named if name.startswith(_BACKBONE)]
    others = [parameter for name, parameter in named if not name.startswith(_BACKBONE)]
    return torch.optim.SGD(
        [{"params": [parameter for _, parameter in named]}]
        if scale == 1
        else [{"params": backbone, _SCALE: scale}, {"params": others, _SCALE: 1.0}],
        lr=1.0,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def set_step_size(optimizer: torch.optim.Optimizer, size: float) -> None:
    """Make `size` the step size of each group, times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = size * group.get(_SCALE, 1.0)
