"""Decoding of image files."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dan_fast.core.errors import DanFastError


def read_image(path: Path) -> Tensor:
    """Decodes an image file (anything Pillow reads, also the BMP of older benchmarks) into uint8 RGB (3,H,W).

    Raises:
        DanFastError: a file that is absent, unreadable, truncated or no image.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    return decode_image(content, path)


def decode_image(content: bytes, path: Path) -> Tensor:
    """`read_image` for the content of a file that has been read; `path` is for the message."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return F.pil_to_tensor(image.convert("RGB"))
    # Pillow's decoders raise many kinds of exception on damaged files, struct.error and SyntaxError too.
    except Exception as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DanFastError:
    """The sentence for an image that cannot be read or decoded."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if reason.startswith("cannot identify image file"):
        reason = "it is no image that Pillow knows"
    return DanFastError(f"The image {path} cannot be decoded ({reason}); replace it, or set broken_images to skip.")
