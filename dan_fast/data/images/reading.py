"""Decoding of image files."""

import io
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dan_fast.core.errors import DanFastError

# What decodes and resizes: other versions may do it to other pixel values.
DECODED_BY = f"Pillow {PIL.__version__}, torchvision {torchvision.__version__}"
# Of EXIF.
_ORIENTATION = 0x0112


def read_image(path: Path) -> Tensor:
    """Decodes an image file (anything Pillow reads, also the BMP of older benchmarks) into uint8 RGB (3,H,W).

    It is upright: turned as the file's EXIF orientation says, as browsers show it and fast-reid reads it.

    Raises:
        DanFastError: a file that is absent, unreadable, truncated or no image.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    return decode_image(content, path)


def decode_image(content: bytes | Image.Image | np.ndarray | Tensor, path: Path | str) -> Tensor:
    """`read_image` for what has been read: a file's bytes, or an image in memory; `path` is for the message.

    An image in memory is Pillow's in any mode but I, F and La, turned by its EXIF orientation too, or in RGB a uint8
    (H,W,3) array or (3,H,W) tensor.
    """
    try:
        pixels = _pixels(content)
        if pixels.numel() == 0:
            raise ValueError("it has no pixels")
        return pixels
    # Another attempt may have the room.
    except MemoryError:
        raise
    # Pillow's decoders raise many kinds of exception on damaged files, struct.error and SyntaxError too.
    except Exception as error:
        raise unreadable(path, error) from error


def _pixels(content: bytes | Image.Image | np.ndarray | Tensor) -> Tensor:
    if isinstance(content, bytes):
        with Image.open(io.BytesIO(content)) as image:
            return _pixels(image)
    if isinstance(content, Image.Image):
        return F.pil_to_tensor(_of_eight_bits(_upright(content)).convert("RGB"))
    rows = content.permute(1, 2, 0).cpu().numpy() if isinstance(content, Tensor) else content
    # A copy with the strides of a decoded image; PyTorch takes neither arrays that must not be written nor negative
    # strides.
    return torch.from_numpy(np.array(rows, order="C")).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """As a camera was held that wrote down how; itself where nothing is to be turned."""
    try:
        return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF raises many kinds, and the pixels may be whole
        return image


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits in 8; Pillow would make white of all that is above 255."""
    # Mode I is of 16 bits in a PGM, and for older versions of Pillow in a PNG.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has numbers of no known range")
    return image


def unreadable(path: Path | str, error: Exception) -> DanFastError:
    """The sentence for an image that cannot be read or decoded."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, IsADirectoryError):
        return DanFastError(f"{path} is a folder and no image: give the files in it.")
    if reason.startswith("cannot identify image file"):
        reason = "it is no image that Pillow knows"
    return DanFastError(
        f"The image {path} cannot be decoded ({reason}); replace it, or where broken_images can be set, set it to skip."
    )
