"""The transforms of `dan_fast.data.images.transforms` for whole batches, on the device of the images."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.data.images.transforms import FLIP_PROBABILITY, JITTER, padding

_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
# torchvision's ColorJitter shuffles four changes; the fourth, of hue, is not used here.
_SHUFFLED = 4
# Red, green and blue in the grey of ITU-R 601-2, as torchvision rounds them.
_GREY = (0.2989, 0.587, 0.114)
# Images at a time on a CPU, few enough to stay in its cache from one change to the next.
_CHUNK = 8


class Draws(NamedTuple):
    """The random choices for n images.

    Attributes:
        flip: (n,) bool: mirrored left to right.
        top, left: (n,) int64: where the crop begins in the padded image, in pixels.
        order: (n,3) int64: which change of colour comes first, second and third: 0 brightness, 1 contrast,
            2 saturation.
        factors: (n,3) float32: of brightness, contrast and saturation.
    """

    flip: Tensor
    top: Tensor
    left: Tensor
    order: Tensor
    factors: Tensor


def draw(seeds: Sequence[int], image_size: tuple[int, int]) -> Draws:
    """Draws for images that are seeded one by one; the global generators stay as they are.

    Args:
        seeds: n seeds; an image's draws depend on its own seed and the size alone, and they are those of
            `train_transform` after `torch.manual_seed(seed)`.
        image_size: (height, width) in pixels.

    Example:
        >>> draw([7, 8, 7], (128, 64)).top.tolist()
        [3, 9, 3]
    """
    # One generator a call: two threads may draw at once.
    generator = torch.Generator()
    room = 2 * padding(image_size) + 1
    flips, tops, lefts, orders, factors = [], [], [], [], []
    for seed in seeds:
        generator.manual_seed(seed)
        flips.append(torch.rand(1, generator=generator).item() < FLIP_PROBABILITY)
        for offsets in (tops, lefts):
            # Without padding there is one place for the crop, and nothing is drawn.
            offsets.append(int(torch.randint(0, room, (), generator=generator)) if room > 1 else 0)
        shuffled = torch.randperm(_SHUFFLED, generator=generator).tolist()
        orders.append([change for change in shuffled if change < len(JITTER)])
        factors.append([torch.empty(1).uniform_(1 - most, 1 + most, generator=generator).item() for most in JITTER])
    return Draws(
        torch.tensor(flips, dtype=torch.bool),
        torch.tensor(tops, dtype=torch.int64),
        torch.tensor(lefts, dtype=torch.int64),
        torch.tensor(orders, dtype=torch.int64).view(-1, len(JITTER)),
        torch.tensor(factors, dtype=torch.float32).view(-1, len(JITTER)),
    )


def augment(images: Tensor, draws: Draws, preprocessing: Preprocessing = IMAGENET) -> Tensor:
    """What `train_transform` does after the resizing, for a batch of images at once.

    Flip, black padding and crop, brightness, contrast and saturation in the order drawn, to [0, 1], normalised by
    a mean and a standard deviation. Equal bits on repetition. With the draws of the same seeds the result is that of
    `train_transform`, but for one grey level of 255, seldom two, in less than one pixel in a thousand: after each
    change of colour a level is cut to a whole number, and where the exact one lies on the edge, the last bit of a float
    decides.

    Args:
        images: (n,3,H,W) uint8, on any device.
        draws: of the n images, on the same device.
        preprocessing: whose mean and standard deviation are taken.

    Returns:
        (n,3,H,W) float32 on that device.

    Example:
        >>> images = torch.full((2, 3, 8, 4), 128, dtype=torch.uint8)
        >>> augment(images, draw([1, 2], (8, 4))).shape
        torch.Size([2, 3, 8, 4])
    """
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for part in _parts(images):
        drawn = Draws(*(each[part] for each in draws))
        out = result[part].copy_(_moved(images[part], drawn))
        _jitter_(out, drawn)
        _normalize_(out, preprocessing)
    return result


def normalize(images: Tensor, preprocessing: Preprocessing = IMAGENET) -> Tensor:
    """What `test_transform` does after the resizing, to the last bit; arguments and result as `augment`.

    Example:
        >>> normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
        tensor([-2.1179, -2.0357, -1.8044])
    """
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for part in _parts(images):
        _normalize_(result[part].copy_(images[part]), preprocessing)
    return result


def _parts(images: Tensor) -> list[slice]:
    """The whole batch at once on a GPU, and what fits into the cache of a CPU."""
    size = _CHUNK if images.device.type == "cpu" else max(1, len(images))
    return [slice(start, start + size) for start in range(0, len(images), size)]


def _moved(images: Tensor, draws: Draws) -> Tensor:
    """Flipped, padded and cropped: (n,3,H,W) uint8."""
    n, _, height, width = images.shape
    images = torch.where(draws.flip[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (padding((height, width)),) * 4)
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: all of them, by top and left
    return crops[torch.arange(n, device=images.device), :, draws.top, draws.left]


def _jitter_(images: Tensor, draws: Draws) -> None:
    """Brightness, contrast and saturation of (n,3,H,W) grey levels in float32, in place.

    Each is a blend `factor * image + (1 - factor) * other` with black, the mean grey of the image or the grey of the
    pixel, cut to whole levels from 0 to 255.
    """
    for place in range(draws.order.shape[1]):
        change = draws.order[:, place]
        factor = draws.factors.gather(1, change[:, None])[:, 0]
        red, green, blue = images.unbind(1)
        # Each product is rounded: `add_(green, alpha=...)` would round it on some devices and not on others.
        grey = (red * _GREY[0]).add_(green * _GREY[1]).add_(blue * _GREY[2]).floor_()
        # Whole numbers, whose sum is exact in float64 in any order.
        mean = (grey.sum((1, 2), dtype=torch.float64) / grey[0].numel()).to(torch.float32)
        of_pixel = torch.where(change == _SATURATION, 1 - factor, 0.0)
        of_image = torch.where(change == _CONTRAST, (1 - factor) * mean, 0.0)
        other = grey.mul_(of_pixel[:, None, None]).add_(of_image[:, None, None])
        images.mul_(factor[:, None, None, None]).add_(other[:, None]).clamp_(0, 255).floor_()


@functools.cache
def _statistics(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (3,1,1)."""
    # Cached for each device: a copy of numbers to a GPU waits for the device.
    numbers = torch.tensor([preprocessing.mean, preprocessing.std], dtype=torch.float32, device=device)
    return numbers[..., None, None].unbind()


def _normalize_(images: Tensor, preprocessing: Preprocessing) -> None:
    mean, std = _statistics(preprocessing, images.device)
    images.mul_(1 / 255).sub_(mean).div_(std)
