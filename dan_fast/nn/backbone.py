"""The backbones: torchvision ResNets up to their last map."""

import http.client
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from dan_fast.errors import DanFastError

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
_HEAD = ("avgpool", "fc")
_NAMED_KEYS = 5


class ResNetMap(nn.Sequential):
    """A torchvision ResNet without pooling and classifier, (B, 3, H, W) to (B, out_channels, H/32, W/32).

    Its parameters have torchvision's names.
    """

    def __init__(self, resnet: torchvision.models.ResNet) -> None:
        super().__init__(OrderedDict((n, m) for n, m in resnet.named_children() if n not in _HEAD))
        self.out_channels: int = resnet.fc.in_features


def build_backbone(name: str = "resnet50", weights: str | PathLike[str] = "none") -> ResNetMap:
    """A ResNet that gives its last map.

    Args:
        name: one of `BACKBONES`.
        weights: "none" for random weights; "imagenet" for torchvision's IMAGENET1K_V1, the older of its two
            sets and the one of the paper's time, downloaded once into torch's cache; or the path of a file
            that `torch.save` wrote of a torchvision ResNet's state dict, whose `fc.*` is left out.

    Returns:
        A module of (B, 3, H, W) to (B, C, H/32, W/32), sizes rounded up, with C as its `out_channels`.

    Raises:
        DanFastError: an unknown name, a failed download, or a file that is missing, is no state dict or
            belongs to another network.

    Example:
        >>> build_backbone("resnet18")(torch.zeros(1, 3, 64, 32)).shape
        torch.Size([1, 512, 2, 1])
    """
    if name not in BACKBONES:
        raise DanFastError(f"there is no backbone {name!r}; choose one of {', '.join(BACKBONES)}")
    state = None
    if weights == "imagenet":
        state = _download_imagenet(name)
    elif weights != "none":
        state = _read_state_dict(Path(weights))
    backbone = ResNetMap(torchvision.models.get_model(name, weights=None))
    if state is not None:
        _load(backbone, state, name, weights)
    return backbone


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


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise DanFastError(f"there is no weights file {path}; give its path, or 'none' or 'imagenet' as weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes can make the unpickler raise almost anything.
    except Exception as error:
        raise DanFastError(
            f"the weights file {path} is damaged or no file of torch.save ({type(error).__name__}); "
            f"download it again or save the state dict of a torchvision ResNet in it"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DanFastError(f"the weights file {path} holds no state dict; save that of a torchvision ResNet in it")
    return state


def _load(backbone: ResNetMap, state: Mapping[str, Tensor], name: str, weights: str | PathLike[str]) -> None:
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    wanted = backbone.state_dict()
    # Files older than batch norm's counters lack them; they start at 0.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    reshaped = [key for key in state if key in wanted and state[key].shape != wanted[key].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    found = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
    if found:
        raise DanFastError(f"the weights {weights} do not fit {name} ({found}); give a file of a {name}")
    backbone.load_state_dict(state, strict=False)


def _some(keys: list[str]) -> str:
    more = len(keys) - _NAMED_KEYS
    return ", ".join(keys[:_NAMED_KEYS]) + (f" and {more} more" if more > 0 else "")
