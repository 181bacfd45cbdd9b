"""Image transforms (torchvision v2); on uint8 images as far as possible, which is several times faster."""

from collections.abc import Iterable
from numbers import Integral

import torch
from torchvision.transforms import v2

from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import IMAGENET, Preprocessing

FLIP_PROBABILITY = 0.5
# Largest change of brightness, contrast and saturation: a factor of 1 - x to 1 + x.
JITTER = (0.2, 0.15, 0.15)


def train_transform(image_size: tuple[int, int], preprocessing: Preprocessing = IMAGENET) -> v2.Compose:
    """The augmentation common in re-identification: flip, pad and crop, mild colour jitter.

    No random erasing: it helps within a domain and is known to harm on unseen ones (Luo et al., "Bag of
    Tricks and a Strong Baseline for Deep Person Re-identification", 2019, Sec. 5), which is what this network
    is for. No change of hue: it distinguishes clothes, and changing it takes longer than all other steps together.

    One image at a time; `dan_fast.data.images.augment` does the same to a batch, from the same random draws.

    Args:
        image_size: (height, width) in pixels.
        preprocessing: how images are resized and normalised for the network.

    Returns:
        A transform of a uint8 (3,h,w) image into a float32 (3,height,width) one, normalised by the mean and standard
        deviation of `preprocessing`; its randomness is torch's default CPU generator.

    Raises:
        DanFastError: a size that is not two positive whole numbers.

    Example:
        >>> train_transform((128, 64))(torch.zeros(3, 160, 60, dtype=torch.uint8)).shape
        torch.Size([3, 128, 64])
    """
    brightness, contrast, saturation = JITTER
    return v2.Compose(
        [
            resize(image_size, preprocessing.interpolation),
            v2.RandomHorizontalFlip(FLIP_PROBABILITY),
            v2.RandomCrop(image_size, padding=padding(image_size)),
            v2.ColorJitter(brightness, contrast, saturation),
            *_to_float(preprocessing),
        ]
    )


def test_transform(image_size: tuple[int, int], preprocessing: Preprocessing = IMAGENET) -> v2.Compose:
    """Resizes and normalises; arguments, result and errors as `train_transform`, without any randomness."""
    return v2.Compose([resize(image_size, preprocessing.interpolation), *_to_float(preprocessing)])


# pytest would collect the function as a test wherever it is imported.
test_transform.__test__ = False


def resize(image_size: tuple[int, int], interpolation: str = "bilinear") -> v2.Resize:
    """The first step of both transforms, whose result a cache keeps: uint8 (3,h,w) to uint8 (3,height,width).

    Raises:
        DanFastError: as `train_transform`.
    """
    return v2.Resize(_checked(image_size), v2.InterpolationMode(interpolation), antialias=True)


def padding(image_size: tuple[int, int]) -> int:
    """Black pixels around an image before it is cropped: the usual 10 at a height of 256."""
    return round(image_size[0] * 10 / 256)


def _to_float(preprocessing: Preprocessing) -> tuple[v2.Transform, v2.Transform]:
    return v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocessing.mean, preprocessing.std)


def _checked(image_size: tuple[int, int]) -> tuple[int, int]:
    size = tuple(image_size) if isinstance(image_size, Iterable) else ()
    if len(size) != 2 or not all(isinstance(side, Integral) and side > 0 for side in size):
        raise DanFastError(f"The image size {image_size!r} is not a height and a width; give two, such as 256 128.")
    return int(size[0]), int(size[1])
