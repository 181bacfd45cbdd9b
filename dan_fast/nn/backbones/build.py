"""`build_backbone` makes a backbone, a network up to its last map, by name."""

from os import PathLike

from dan_fast.core.errors import DanFastError
from dan_fast.nn.backbones.resnet import RESNETS, ResNetMap, build_resnet
from dan_fast.nn.backbones.timm import PREFIX, TimmMap, build_timm

__all__ = ["BACKBONES", "ResNetMap", "TimmMap", "build_backbone"]

# What makes each; timm's, known by their prefix, are beside these.
_BUILDERS = dict.fromkeys(RESNETS, build_resnet)
BACKBONES = tuple(_BUILDERS)


def build_backbone(
    name: str = "resnet50",
    weights: str | PathLike[str] = "none",
    image_size: tuple[int, int] = (224, 224),
    gradient_checkpointing: bool = False,
) -> ResNetMap | TimmMap:
    """Build a network that outputs its last map.

    Args:
        name: one of `BACKBONES`, of torchvision; or `timm:NAME` for a model of timm whose last layer before the head
            gives a map, or tokens that make one (those of classes and registers are left out).
        weights: "none" for random weights; "imagenet" for those that torchvision or timm downloads, from torchvision
            IMAGENET1K_V1, the older of its two sets and the one of the paper's time; or the path of a file with the
            network's state dict, under torchvision's or timm's names, that `torch.save` or safetensors wrote
            (.safetensors). The weights of its head are left out. Position embeddings of another grid are resampled.
        image_size: (height, width) of the images; models whose position embeddings fix a size are made for it.
        gradient_checkpointing: compute maps again in the backward pass instead of keeping all of them.

    Returns:
        A module of (B, 3, H, W) to (B, C, h, w), with C as its `out_channels`; for a ResNet h and w are H/32 and
        W/32, rounded up. Its `preprocessing` is how its images are to be resized and normalised.

    Raises:
        DanFastError: an unknown name, timm is not installed, a model without a map or of another size, a failed
            download, or a file that is missing, is no state dict or belongs to another network.

    Example:
        >>> import torch
        >>> build_backbone("resnet18")(torch.zeros(1, 3, 64, 32)).shape
        torch.Size([1, 512, 2, 1])
    """
    if name.startswith(PREFIX):
        return build_timm(name.removeprefix(PREFIX), weights, tuple(image_size), gradient_checkpointing)
    if name not in _BUILDERS:
        raise DanFastError(
            f"there is no backbone {name!r}; choose one of {', '.join(BACKBONES)}, or {PREFIX}NAME for a model of timm"
        )
    return _BUILDERS[name](name, weights, gradient_checkpointing)
