"""Exporting a network: the file is made, run and compared before it is put in its place."""

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import alone, remove_unfinished, write_whole
from dan_fast.core.home import expanded
from dan_fast.data.images.transforms import test_transform
from dan_fast.export import formats
from dan_fast.export.graph import FeatureGraph, description, traced
from dan_fast.nn import DAN
from dan_fast.training.checkpoint import is_checkpoint

Format: TypeAlias = Literal["onnx", "pt2"]
Input: TypeAlias = Literal["uint8", "normalized"]
Precision: TypeAlias = Literal["float32", "float16", "int8"]

# The largest difference of a float32 file's features, of unit length, to the network's.
TOLERANCE = 1e-4
# Images in a batch that the file and the network are compared on.
BATCH = 8
_DRAWN = 9


class Difference(NamedTuple):
    """How the features that a file gives differ from the network's.

    Attributes:
        largest: difference of two numbers.
        cosine: the smallest one of an image's two features.
        images: compared.
    """

    largest: float
    cosine: float
    images: int


def export_network(
    network: DAN,
    path: str | PathLike[str],
    format: Format = "onnx",
    input: Input = "uint8",
    precision: Precision = "float32",
    images: Tensor | Iterable[Tensor] | None = None,
) -> Difference:
    """Write a network to a file that needs nothing of dan_fast, and compare the file with the network.

    The file takes (B, 3, H, W) images in RGB at `network.image_size`, any B, and gives (B, C) float32: `embed` in
    evaluation mode, at unit length. Its metadata says how images are to be resized.

    Args:
        network: on any device, of any mode and floating type; it stays as it is.
        path: of the file.
        format: "onnx", which ONNX Runtime and others run, or "pt2", which `torch.export.load` reads.
        input: "uint8", normalised by the file, or "normalized": float32 that has been normalised.
        precision: "float16" halves the file; "int8", for ONNX only, reduces it to a quarter to a third: weights have 8
            bits, except in the first convolution and in those with groups, and inner values are rounded to 8 bits in
            each batch.
        images: (n, 3, H, W) uint8 to compare on, or batches of these, of which few are held at a time; by default some
            are drawn at random.

    Raises:
        DanFastError: the path is a folder, a file of another suffix or one of the other format's, a package is missing,
            the network cannot be traced, the features are not finite or, of a float32 file, differ by more than 1e-4,
            or another process is writing the same file. There is then no file, or the one that was there before.
        TypeError: `network` is not a DAN.
        ValueError: an unknown format, input or precision, int8 without ONNX, or no image in `images`, or images of
            another shape or dtype.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> network = DAN(2, backbone=torch.nn.Conv2d(3, 4, 3), image_size=(8, 4), reduction=2)
        >>> export_network(network, Path(tempfile.mkdtemp()) / "network.pt2", "pt2").largest < 1e-4
        True
    """
    if not isinstance(network, DAN):
        raise TypeError(
            f"network must be a dan_fast.nn.DAN, got {type(network).__name__}: hand the part of it that gives maps to "
            "DAN as its backbone"
        )
    for name, value, kinds in (
        ("format", format, Format),
        ("input", input, Input),
        ("precision", precision, Precision),
    ):
        if value not in get_args(kinds):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {value!r}")
    if format == "onnx":
        formats.require_packages()
    elif precision == "int8":
        raise ValueError("precision int8 is made for format onnx alone")
    path = expanded(path)
    require_name(path, format)
    network = deepcopy(network).to("cpu", torch.float32).eval()
    images = _drawn(network.image_size) if images is None else images
    content, run = _made(deepcopy(network), format, input, precision)
    found = _compared(network, run, input, images.split(BATCH) if isinstance(images, Tensor) else images)
    _require_alike(found, precision, path)
    with alone(path.with_name(f".{path.name}.lock")):
        remove_unfinished(path.parent, re.escape(path.name))
        write_whole(path, lambda stream: stream.write(content))
    return found


def require_name(path: Path, format: Format) -> None:
    """Refuse a path that is a folder, has the other format's suffix, or is a file that no export has named."""
    if not path.name or path.is_dir():
        raise DanFastError(f"{path} is a folder: name a file in it, such as {path / f'network.{format}'}.")
    other = {".onnx": "onnx", ".pt2": "pt2"}.get(path.suffix.lower())
    if other not in (format, None):
        raise DanFastError(f"{path} is to be written as {format}: name it .{format}, or choose format {other}.")
    if path.is_file() and path.stat().st_size and (other is None or is_checkpoint(path)):
        raise DanFastError(f"{path} is a file already, and no exported network: name another .{format} file.")


def _made(network: DAN, format: Format, takes: Input, precision: Precision) -> tuple[bytes, formats.Run]:
    """The content of the file, and what it computes; the network is changed."""
    metadata = description(network, takes, precision)
    graph = FeatureGraph(network, normalises=takes == "uint8", half=precision == "float16")
    try:
        program = traced(graph)
        if format == "onnx":
            content = formats.to_onnx(program, metadata, int8=precision == "int8")
            return content, formats.run_onnx(content)
        content = formats.to_pt2(program, metadata)
        return content, formats.run_pt2(content)
    except DanFastError:
        raise
    # A backbone may be anything: tracing, the exporter and ONNX Runtime raise many kinds of exception.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise DanFastError(
            f"The network cannot be written as {format} in {precision} ({reason}): choose another format or backbone."
        ) from error


def _drawn(image_size: tuple[int, int]) -> Tensor:
    """Images of colours that change over the image, so that their features are not all alike."""
    coarse = torch.rand(_DRAWN, 3, 5, 3, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, image_size, mode="bilinear") * 255).to(torch.uint8)


@torch.no_grad()
def _compared(network: DAN, run: formats.Run, takes: Input, batches: Iterable[Tensor]) -> Difference:
    """How what `run` gives for images differs from the network's features."""
    transform = test_transform(network.image_size, network.preprocessing)
    largest, cosine, count = torch.tensor(0.0), torch.tensor(1.0), 0
    shape = (3, *network.image_size)
    for images in _with_one_alone(batches):
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            found = f"{tuple(images.shape)} of {images.dtype}"
            raise ValueError(f"images must be (n, {', '.join(map(str, shape))}) of torch.uint8, got {found}")
        normalized = torch.stack([transform(image) for image in images])
        wanted = F.normalize(network.embed(normalized), dim=1)
        given = run(images if takes == "uint8" else normalized)
        # Of tensors, as NaN would get lost among Python's numbers.
        largest = torch.maximum(largest, (given - wanted).abs().max())
        cosine = torch.minimum(cosine, F.cosine_similarity(given, wanted).min())
        count += len(images)
    if not count:
        raise ValueError("images holds no image to compare on")
    return Difference(float(largest), float(cosine), count)


def _with_one_alone(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches, but for the last image, which comes by itself: a file may be right for larger batches only."""
    held = None
    for batch in filter(len, batches):
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield from filter(len, (held[:-1], held[-1:]))


def _require_alike(found: Difference, precision: Precision, path: str | PathLike[str]) -> None:
    if not isfinite(found.largest):
        raise DanFastError(
            f"The {precision} file gives features that are not finite, so {path} was not written: choose float32."
        )
    if precision == "float32" and found.largest > TOLERANCE:
        raise DanFastError(
            f"The file's features differ from the network's by {found.largest:.1e}, more than {TOLERANCE:.0e}, so "
            f"{path} was not written: use the other format, or another version of PyTorch."
        )
