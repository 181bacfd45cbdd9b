"""Other statistics in the place of batch norm's."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from registry import HAD, change
from torch import Tensor, nn

from dan_fast.nn import DAN


@change
def lenders_normalised_apart() -> Iterator[None]:
    """Batch norm takes the statistics of labelled images alone; those that lend their style have their own.

    For style_mixing unlabeled.
    """
    batch_norm, maps = F.batch_norm, DAN.maps
    parts: list[int] = []

    def apart(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not parts or len(x) != sum(parts):
            return batch_norm(x, *arguments, **options)
        HAD.add("lenders_normalised_apart")
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, arguments, strict=False)), **options}
        labeled, lenders = x.split(parts)
        alone = {**given, "running_mean": None, "running_var": None, "training": True}
        # Torch's order: what is kept of the statistics is that of the labelled images.
        return torch.cat([batch_norm(labeled, **given), batch_norm(lenders, **alone)])

    def maps_in_parts(self: DAN, images: Tensor, lenders: int = 0) -> Tensor:
        parts[:] = [len(images) - lenders, lenders] if lenders else []
        try:
            return maps(self, images, lenders)
        finally:
            parts.clear()

    with patch.object(F, "batch_norm", apart), patch.object(DAN, "maps", maps_in_parts):
        yield


class _HalfInstanceNorm(nn.Module):
    """Batch norm whose first half of channels is normalised image by image, with the same weight and bias."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.channels = norm.weight.shape[0] // 2

    def forward(self, x: Tensor) -> Tensor:
        HAD.add("instance_norm_early")
        weight, bias = self.norm.weight[: self.channels], self.norm.bias[: self.channels]
        # Of Lite0, the activations that timm's norms contain are ReLU6 or none.
        own = self.norm.act(F.instance_norm(x[:, : self.channels], weight=weight, bias=bias, eps=self.norm.eps))
        return torch.cat([own, self.norm(x)[:, self.channels :]], dim=1)


@change
def instance_norm_early() -> Iterator[None]:
    """The first norm of each block in the first two stages is half an instance norm, as in IBN-Net-a.

    For timm's EfficientNets. Pan et al., "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
    ECCV 2018.
    """
    init = DAN.__init__

    def init_with_instance_norm(self: DAN, *arguments: Any, **settings: Any) -> None:
        init(self, *arguments, **settings)
        for stage in self.backbone.early_stages:
            for block in stage:
                block.bn1 = _HalfInstanceNorm(block.bn1)

    with patch.object(DAN, "__init__", init_with_instance_norm):
        yield
