"""How images are resized and normalised for a network, which backbones, loaders and pictures share."""

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
        """What `to_dict` gave."""
        return cls(tuple(content["mean"]), tuple(content["std"]), content["interpolation"])


IMAGENET = Preprocessing()
