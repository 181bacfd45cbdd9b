"""`dan-fast export`: a trained network as a file that runs without this package."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import require_writable
from dan_fast.core.home import expanded
from dan_fast.data.images.reading import read_image
from dan_fast.data.images.transforms import resize
from dan_fast.export import Format, Input, Precision, export_network
from dan_fast.export.exporting import BATCH, TOLERANCE, require_name
from dan_fast.inference.sources import find_images, samples_of
from dan_fast.nn import DAN
from dan_fast.training.build import trained_network
from dan_fast.training.config import Paths, as_list


def export(
    checkpoint: str,
    out: str,
    format: Format = "onnx",
    input: Input = "uint8",
    precision: Precision = "float32",
    images: Paths | None = None,
) -> None:
    """Write a trained network to a file that runs without dan_fast, run it, and print how it differs.

    Args:
        checkpoint: The checkpoint.pt of a run, its chosen.pt, or a folder that `dan-fast share` wrote.
        out: The file to write.
        format: onnx, for ONNX Runtime and other readers of ONNX, or pt2, which torch.export.load reads.
        input: The input of the file, RGB at the network's size: uint8, which the file normalises, or normalized,
            float32 that the caller has normalised.
        precision: float32; float16, half the size; or int8 (onnx only), a quarter to a third of the size, with inner
            values rounded in each batch.
        images: Images, folders of images or datasets on which to compare the file with the network; random images by
            default.
    """
    if format == "pt2" and precision == "int8":
        raise DanFastError("--precision int8 is made by ONNX Runtime: use --format onnx, or another precision.")
    require_writable(out)
    require_name(expanded(out), format)
    files = [sample.path for sample in samples_of(find_images(as_list(images or [])))]
    network = trained_network(checkpoint)[0]
    found = export_network(network, out, format, input, precision, _read(files, network) if files else None)
    (height, width), (mean, std, interpolation) = network.image_size, network.preprocessing
    values = "uint8" if input == "uint8" else f"float32 of mean {mean} and deviation {std}"
    print(
        f"{out}: {format}, {precision}, {Path(out).stat().st_size / 1e6:.1f} MB. It takes RGB images (B, 3, {height}, "
        f"{width}) in {values}, resized with antialiased {interpolation} interpolation, and gives "
        f"features (B, {network.classifier.in_features}) of unit length."
    )
    allowed = f" ({TOLERANCE:.0e} is allowed)" if precision == "float32" else f"; smallest cosine {found.cosine:.5f}"
    print(f"Largest difference to the network's features on {found.images} images: {found.largest:.1e}{allowed}.")


def _read(files: Sequence[Path], network: DAN) -> Iterator[Tensor]:
    """The images, (n, 3, H, W) uint8, resized as evaluation does, some at a time."""
    resized = resize(network.image_size, network.preprocessing.interpolation)
    for first in range(0, len(files), BATCH):
        yield torch.stack([resized(read_image(file)) for file in files[first : first + BATCH]])
