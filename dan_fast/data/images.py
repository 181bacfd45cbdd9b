"""Decoding of image files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dan_fast.errors import DanFastError


def read_image(path: Path) -> Tensor:
    """Decodes an image file (anything Pillow reads, also the BMP of older benchmarks) into uint8 RGB (3,H,W).

    Raises:
        DanFastError: a file that is absent, unreadable, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            return F.pil_to_tensor(image.convert("RGB"))
    # Pillow's decoders raise many kinds of exception on damaged files, struct.error and SyntaxError too.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).replace(f" '{path}'", "") or type(error).__name__
        raise DanFastError(
            f"The image {path} cannot be decoded ({reason}); replace it, or set broken_images to skip."
        ) from error
