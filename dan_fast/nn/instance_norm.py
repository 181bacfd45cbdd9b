"""Instance norm beside batch norm in early maps, which then hold less of what tells one camera from another."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dan_fast.core.errors import DanFastError


class HalfInstanceNorm(nn.Module):
    """A batch norm of which the first half of the channels is normalised image by image, in training and evaluation.

    Weight and bias stay those of the batch norm, pretrained ones too. IBN-a of Pan et al., "Two at Once: Enhancing
    Learning and Generalization Capacities via IBN-Net", ECCV 2018.

    Args:
        norm: whose place it takes; an activation inside, as timm's have, is kept.

    Example:
        >>> norm = HalfInstanceNorm(nn.BatchNorm2d(4)).eval()
        >>> x = torch.rand(2, 4, 8, 4)
        >>> torch.allclose(norm(3 * x + 5)[:, :2], norm(x)[:, :2], atol=1e-3)  # whatever the image's contrast
        True
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        half, out = x.shape[1] // 2, self.norm(x)
        # F.instance_norm and slices of a channels_last map give derivatives in the other layout, on which the batch
        # norm's take ten times as long on a CPU; sums over (B, H, W, C) keep it. Under autocast they are float32.
        rows = x.permute(0, 2, 3, 1)[..., :half].to(self.norm.weight.dtype)
        rows = rows - rows.mean((1, 2), keepdim=True)
        scale = self.norm.weight[:half] * (rows.square().mean((1, 2), keepdim=True) + self.norm.eps).rsqrt()
        own = torch.addcmul(self.norm.bias[:half], rows, scale)
        for name in ("drop", "act"):
            own = getattr(self.norm, name, nn.Identity())(own)
        own = F.pad(own, (0, x.shape[1] - half)).permute(0, 3, 1, 2)
        first = torch.arange(x.shape[1], device=x.device) < half
        return torch.where(first[:, None, None], own.to(out.dtype), out)


def normalise_early_maps(backbone: nn.Module) -> None:
    """Puts a `HalfInstanceNorm` in the place of the first batch norm of each block of a backbone's `early_stages`.

    Raises:
        DanFastError: a backbone that names no early stages, or without batch norm in them; it stays as it was.
    """
    places = [place for stage in getattr(backbone, "early_stages", ()) for place in map(_first_norm, stage.children())]
    if not any(places):
        raise DanFastError(
            "Instance norm takes the place of batch norm in the early blocks of a convolutional network, which this "
            "backbone does not have: choose a ResNet or another network with batch norm of timm, or set "
            "model.instance_norm to false."
        )
    for parent, name in filter(None, places):
        setattr(parent, name, HalfInstanceNorm(getattr(parent, name)))


def _first_norm(block: nn.Module) -> tuple[nn.Module, str] | None:
    """Where the first batch norm with a weight stands inside of a block."""
    for parent in block.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and child.affine:
                return parent, name
    return None
