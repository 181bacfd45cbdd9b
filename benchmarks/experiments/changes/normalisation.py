"""Other statistics in the place of batch norm's."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from registry import HAD, change
from torch import Tensor

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
