"""Instance norm beside batch norm in early maps, which then hold less of what tells one camera from another."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.errors import DanFastError


class HalfInstanceNorm(nn.Module):
    """A batch norm that normalises the first half of its channels image by image, in training and evaluation.

    Weight and bias stay those of the batch norm, including pretrained ones. This is IBN-a of Pan et al., "Two at Once:
    Enhancing Learning and Generalization Capacities via IBN-Net", ECCV 2018.

    Args:
        norm: the batch norm that it replaces; an activation inside it, as timm's have, is kept.

    Raises:
        ValueError: it is not a batch norm with a weight and a bias, or its activation has numbers of its own for each
            channel, like `nn.PReLU(C)`.

    Example:
        >>> norm = HalfInstanceNorm(nn.BatchNorm2d(4)).eval()
        >>> x = torch.rand(2, 4, 8, 4)
        >>> torch.allclose(norm(3 * x + 5)[:, :2], norm(x)[:, :2], atol=1e-3)  # whatever the image's contrast
        True
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        if not isinstance(norm, nn.BatchNorm2d) or not norm.affine:
            raise ValueError(f"norm must be a BatchNorm2d with affine=True, whose weight and bias it takes: {norm}")
        # Half of the channels go through it apart, in another order of dimensions.
        if any(numbers.numel() > 1 for numbers in getattr(norm, "act", nn.Identity()).parameters()):
            raise ValueError("norm must have an activation that is the same for all channels: give it one, or none")
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        half, out = x.shape[1] // 2, self.norm(x)
        # F.instance_norm and slices of a channels_last map give derivatives in the other layout, on which the batch
        # norm's take ten times as long on a CPU; sums over (B, H, W, C) keep it. In half precision squares
        # of a map overflow.
        weight, bias = self.norm.weight[:half], self.norm.bias[:half]
        wide = statistics_dtype(torch.promote_types(x.dtype, weight.dtype))
        rows = x.permute(0, 2, 3, 1)[..., :half].to(wide)
        rows = rows - rows.mean((1, 2), keepdim=True)
        scale = weight.to(wide) * (rows.square().mean((1, 2), keepdim=True) + self.norm.eps).rsqrt()
        own = torch.addcmul(bias.to(wide), rows, scale)
        for name in ("drop", "act"):
            own = getattr(self.norm, name, nn.Identity())(own)
        own = F.pad(own, (0, x.shape[1] - half)).permute(0, 3, 1, 2)
        first = torch.arange(x.shape[1], device=x.device) < half
        return torch.where(first[:, None, None], own.to(out.dtype), out)


def normalise_early_maps(backbone: nn.Module, required: bool = True) -> bool:
    """Puts a `HalfInstanceNorm` in the place of the first batch norm of each block of a backbone's `early_stages`.

    Args:
        backbone: of `build_backbone`; it stays as it was where it has no such place.
        required: whether it must have one.

    Returns:
        Whether it has.

    Raises:
        DanFastError: a backbone that must have a place and has none.
    """
    blocks = [block for stage in getattr(backbone, "early_stages", ()) for block in _blocks(stage)]
    places = [place for place in map(_first_norm, blocks) if place is not None]
    # Where branches are added whose maps have a norm each, a first one of them is not a block's.
    serves = bool(places) and not any(name == "identity" for _, name in places)
    if required and not serves:
        raise DanFastError(
            "Instance norm takes the place of the first batch norm of the early blocks of a convolutional network, "
            "which this backbone does not have: choose a ResNet or another network of timm with such blocks, or set "
            "model.instance_norm to false."
        )
    for parent, name in places if serves else ():
        setattr(parent, name, HalfInstanceNorm(getattr(parent, name)))
    return serves


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """The blocks of a stage: those of its list of that name, or what it consists of."""
    own = getattr(stage, "blocks", None)
    return list((own if isinstance(own, nn.Module) else stage).children())


def _first_norm(block: nn.Module) -> tuple[nn.Module, str] | None:
    """Where the first batch norm with a weight stands inside of a block."""
    for parent in block.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and child.affine:
                return parent, name
    return None
