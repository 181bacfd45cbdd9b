"""`dan-fast extract`: the features of images in a file."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

from dan_fast.core.batches import BrokenImages
from dan_fast.core.terminal import PLAIN, progress_line
from dan_fast.inference import FeatureExtractor
from dan_fast.inference.feature_file import chunk_folder, require_format, write_features
from dan_fast.inference.sources import find_images


def extract(
    paths: Sequence[str],
    checkpoint: str,
    out: str,
    batch_size: PositiveInt = 128,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    broken_images: BrokenImages = "error",
) -> None:
    """Write the features of images to a file; the same command again continues where it was stopped.

    The file has a row for each image: features, of length 1; paths; pids and camids, -1 where they are unknown; splits;
    datasets, within which pids name persons; and weights, which tell networks apart. The features are those that
    `dan-fast evaluate` ranks; on a CPU and with the same batch_size they are equal to the last bit.

    Args:
        paths: Folders, files or patterns such as 'frames/**/*.jpg', and datasets or manifests, whose identities,
            cameras and splits are written too.
        checkpoint: The checkpoint.pt of a run, its chosen.pt, or a folder that `dan-fast share` wrote.
        out: The .npz or .parquet file. It appears when everything is done; until then, FILE.part beside it holds what
            is done.
        batch_size: Images at a time.
        workers: Processes that decode images; 0 decodes in this one.
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        broken_images: Stop with an error at an image that cannot be decoded, or skip it: its features are NaN.

    Raises:
        DanFastError: nothing at a path, no checkpoint, an image that cannot be decoded, or a file that cannot be
            written.
    """
    file, console = Path(out), Console()
    require_format(file)
    parts = find_images(paths)
    extractor = FeatureExtractor(checkpoint, device, batch_size, workers=workers, broken_images=broken_images)
    for split, samples, dataset in parts:
        known = "without identities" if dataset is None else f"of the {split} split"
        console.print(f"{len(samples)} images {known}, the first is {samples[0].path}.", **PLAIN)
    try:
        with progress_line(console, "Extracting features") as show:
            skipped = write_features(file, extractor, parts, show)
    except KeyboardInterrupt:
        if chunk_folder(file).exists():
            console.print(f"What is done lies in {chunk_folder(file)}: the same command goes on from there.", **PLAIN)
        raise
    for path in skipped:
        console.print(f"Skipped {path}: it cannot be decoded, its features are NaN.", **PLAIN)
    images = sum(len(part.samples) for part in parts)
    console.print(f"{file}: features of {images} images, {extractor.size} numbers each.", **PLAIN)
