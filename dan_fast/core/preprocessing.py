"""How images are resized and normalised for a network, which backbones, loaders and pictures share."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

# Mean and standard deviation of ImageNet's red, green and blue, which torchvision's pretrained weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# The modes in which torchvision resizes uint8 tensors with antialiasing.
INTERPOLATIONS = ("bilinear", "bicubic")


class Preprocessing(NamedTuple):
    """How images are resized and normalised; the default is that of torchvision's ResNets.

    Attributes:
        mean, std: of red, green and blue in [0, 1], subtracted and divided by.
        interpolation: with which images are resized, "bilinear" or "bicubic".

    Example:
        >>> Preprocessing.from_dict(Preprocessing(interpolation="bicubic").to_dict()).interpolation
        'bicubic'
    """

    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    interpolation: str = "bilinear"

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in a checkpoint."""
        return {"mean": list(self.mean), "std": list(self.std), "interpolation": self.interpolation}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Preprocessing":
        """What `to_dict` gave.

        Raises:
            KeyError: one of them is missing.
            TypeError: mean or std is no list.
            ValueError: mean and std are not three numbers that images in [0, 1] can have, or there is no such
                interpolation.
        """
        mean, std, interpolation = tuple(content["mean"]), tuple(content["std"]), content["interpolation"]
        numbers = len(mean) == len(std) == 3 and all(isinstance(each, int | float) for each in (*mean, *std))
        if not numbers or not all(0 <= each <= 1 for each in mean) or not all(0 < each < math.inf for each in std):
            raise ValueError(f"mean {list(mean)} and std {list(std)} are not those of red, green and blue in [0, 1]")
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
        return cls(mean, std, interpolation)


IMAGENET = Preprocessing()
