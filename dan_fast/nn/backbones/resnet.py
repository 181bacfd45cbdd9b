"""torchvision's ResNets up to their last map; the pattern of a backbone, see "Add a backbone" in CONTRIBUTING.md."""

import http.client
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.nn.backbones.recompute import with_weights_kept
from dan_fast.nn.backbones.weights import load_fitting, read_state_dict

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
_HEAD = ("avgpool", "fc")


class ResNetMap(nn.Sequential):
    """A torchvision ResNet without pooling and classifier, (B, 3, H, W) to (B, out_channels, H/32, W/32).

    Its parameters have torchvision's names.

    Args:
        resnet: the network, whose layers are taken.
        gradient_checkpointing: keep the maps between blocks only, and compute the others again in the backward pass.
    """

    preprocessing: Preprocessing = IMAGENET

    def __init__(self, resnet: torchvision.models.ResNet, gradient_checkpointing: bool = False) -> None:
        super().__init__(OrderedDict((n, m) for n, m in resnet.named_children() if n not in _HEAD))
        self.out_channels: int = resnet.fc.in_features
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def early_stages(self) -> list[nn.Module]:
        """The first two stages, whose maps `StyleMixing` changes."""
        return [self.layer1, self.layer2]

    @property
    def cuts(self) -> list[nn.Module]:
        """Stem and first stage: with few operations they make half of what a training pass keeps, see `daml.cut`."""
        return [self.maxpool, self.layer1]

    def forward(self, images: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return with_weights_kept(self, lambda twin: _block_by_block(twin, images))
        return super().forward(images)


def build_resnet(name: str, weights: str | PathLike[str], gradient_checkpointing: bool) -> ResNetMap:
    """See `dan_fast.nn.build_backbone`; `name` is one of `RESNETS`."""
    state = None
    if weights == "imagenet":
        state = _download_imagenet(name)
    elif weights != "none":
        state = read_state_dict(Path(weights), "a torchvision ResNet")
    backbone = ResNetMap(torchvision.models.get_model(name, weights=None), gradient_checkpointing)
    if state is not None:
        load_fitting(backbone, state, name, weights, lambda key: key.startswith("fc."))
    return backbone


def _block_by_block(resnet: ResNetMap, images: Tensor) -> Tensor:
    for child in resnet.children():
        for block in child if isinstance(child, nn.Sequential) else ():
            images = checkpoint(block, images, use_reentrant=False)
        if not isinstance(child, nn.Sequential):
            images = child(images)
    return images


def _download_imagenet(name: str) -> Mapping[str, Tensor]:
    entry = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    # A wrong hash is a RuntimeError, a connection cut short an HTTPException, all else an OSError.
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise DanFastError(
            f"the ImageNet weights of {name} could not be downloaded ({error}); download {entry.url} "
            f"elsewhere and give the path of the file as weights"
        ) from error
