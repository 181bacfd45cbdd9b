"""Train images as chunks of LitData, decoded and resized, and what `training_loader` reads them with.

    pip install litdata
    python scripts/litdata_images.py chunks 256 128 data/market 'data/cuhk03@labeled new'

This writes the train splits of the datasets into the folder `chunks`, images of 256 x 128, and `chunks/samples.json`,
which names them. docs/feeding.md shows the training.
"""

import json
import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litdata.streaming import Cache, StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import Compose

from dan_fast import DanFastError
from dan_fast.core.preprocessing import IMAGENET
from dan_fast.data import ImageSamples, ReIDDataset, Sample, load_dataset, read_image
from dan_fast.data.images.transforms import resize

SAMPLES = "samples.json"


class LitDataImages:
    """Reads pixels from chunks by the paths of the images, in the place of `dan_fast.data.ImageCache`.

    Args:
        samples: the file that `write` left beside the chunks; it can be copied anywhere.
        chunks: where the chunks are, a folder or an address that LitData reads such as s3://bucket/chunks; the folder
            of `samples` where it is None.
        options: as of LitData's `StreamingDataset`: `cache_dir`, `storage_options` and so on.

    Attributes:
        datasets: those that were written, their train splits alone; the images need not exist any more.
        image_size, interpolation: with which they were resized.
    """

    def __init__(self, samples: Path, chunks: str | None = None, **options: Any) -> None:
        described = json.loads(samples.read_text())
        self.image_size, self.interpolation = tuple(described["image_size"]), described["interpolation"]
        self.datasets = [
            ReIDDataset(
                each["name"], Path(each["root"]), train=tuple(Sample(Path(path), *ids) for path, *ids in each["train"])
            )
            for each in described["datasets"]
        ]
        paths = [path for each in described["datasets"] for path, *_ in each["train"]]
        self._places = {path: place for place, path in enumerate(paths)}
        self._chunks = StreamingDataset(str(samples.parent) if chunks is None else chunks, **options)

    def __contains__(self, path: Path) -> bool:
        return str(path) in self._places

    def add(self, paths: Sequence[Path]) -> None:
        """Refuse images that the chunks lack: a loader asks for those that are not contained."""
        if paths:
            raise DanFastError(f"The chunks lack {len(paths)} images, {paths[0]} the first: write them anew.")

    def read(self, path: Path) -> Tensor:
        """The (3,H,W) uint8 image."""
        written, pixels = self._chunks[self._places[str(path)]]
        if bytes(written).decode() != str(path):
            raise DanFastError(f"The chunks have another image in the place of {path}: {SAMPLES} is of other chunks.")
        return pixels


def write(
    datasets: Sequence[ReIDDataset],
    folder: Path,
    image_size: tuple[int, int],
    interpolation: str = IMAGENET.interpolation,
    workers: int = 0,
) -> None:
    """Write the train splits into a new folder; `workers` processes decode."""
    if folder.exists():
        raise DanFastError(f"{folder} exists already: name a new folder for the chunks.")
    train = [sample for dataset in datasets for sample in dataset.train]
    decoded = ImageSamples(train, Compose([read_image, resize(image_size, interpolation)]))
    chunks = Cache(str(folder), chunk_bytes="64MB")
    for pixels, *_, place in DataLoader(decoded, batch_size=None, num_workers=workers):
        # As bytes: of a string that names an image LitData stores the image.
        chunks[place] = str(train[place].path).encode(), pixels
    chunks.done()
    chunks.merge()
    described = [
        {
            "name": dataset.name,
            "root": str(dataset.root),
            "train": [[str(path), *ids] for path, *ids in dataset.train],
        }
        for dataset in datasets
    ]
    text = json.dumps({"image_size": image_size, "interpolation": interpolation, "datasets": described})
    (folder / SAMPLES).write_text(text)


if __name__ == "__main__":
    parser = ArgumentParser(description="Write the train splits of datasets as chunks of LitData.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("image_size", type=int, nargs=2, metavar=("height", "width"))
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--interpolation", default=IMAGENET.interpolation, help="of the network's preprocessing")
    given = parser.parse_args()
    datasets = [load_dataset(name) for name in given.datasets]
    write(datasets, given.folder, tuple(given.image_size), given.interpolation, os.cpu_count() or 0)
