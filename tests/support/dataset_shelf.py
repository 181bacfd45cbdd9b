"""A folder with all datasets of the named protocols: those trained on tiny, the small four whole, in plain colours."""

import os
import runpy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dan_fast.data.datasets.grid import GRID
from dan_fast.data.datasets.ilids import ILIDS
from dan_fast.data.datasets.prid import PRID
from dan_fast.data.datasets.viper import VIPER
from dan_fast.data.samples import KnownDataset, Sample
from tests.support import in_checkout

COLOURS = 24
SMALL = {
    "viper": "VIPeR",
    "prid": "prid_2011/single_shot",
    "grid": "underground_reid",
    "ilids": "i-LIDS_Pedestrian/Persons",
}
MARKET = {
    "bounding_box_train": ["0002_c1s1_1_1.jpg", "0002_c2s1_1_1.jpg", "0007_c1s1_1_1.jpg", "0007_c3s1_1_1.jpg"],
    "query": ["0005_c1s1_000001_00.jpg", "0006_c1s1_000001_00.jpg"],
    "bounding_box_test": [
        *("0005_c2s1_000001_00.jpg", "0006_c2s1_000001_00.jpg"),
        *("0000_c2s1_000001_00.jpg", "-1_c2s1_000001_00.jpg"),
    ],
}
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c3_f0046182.jpg", "0003_c2_f0046182.jpg", "0003_c5_f1.jpg"],
    "query": ["0005_c1_f0049747.jpg"],
    "bounding_box_test": ["0005_c2_f0049747.jpg", "0009_c2_f0049747.jpg"],
}
# The hand-drawn boxes have one image more.
CUHK03 = {
    "bounding_box_train": ["0001_c1_1.png", "0001_c2_2.png", "0002_c1_1.png", "0002_c2_2.png"],
    "query": ["0003_c1_1.png"],
    "bounding_box_test": ["0003_c2_2.png", "0004_c2_2.png"],
}
CUHK02 = [f"P{pair}/cam{side}/{pid:03}_1.png" for pair in (1, 5) for pid in (1, 2) for side in (1, 2)]
CUHK_SYSU = [f"p{pid}_s{scene}_1.jpg" for pid in (1, 22) for scene in (1, 2)]
MSMT17 = {
    "list_train.txt": [(0, "0000/0000_000_01_0303morning_0015_0.jpg"), (0, "0000/0000_001_14_0303morning_0016_0.jpg")],
    "list_val.txt": [(1, "0001/0001_000_01_0303morning_0015_0.jpg"), (1, "0001/0001_001_02_0303noon_0016_0.jpg")],
    "list_query.txt": [(0, "0000/0000_000_02_0303morning_0020_0.jpg")],
    "list_gallery.txt": [(0, "0000/0000_003_07_0303noon_0020_1.jpg"), (2, "0002/0002_003_07_0303noon_0020_1.jpg")],
}

# Numbers with gaps, as VIPeR's are.
VIPER_NUMBERS = [n if n < 300 else n + 242 for n in range(632)]


def touch(folder: Path, names: Sequence[str]) -> None:
    """Empty files with these names, which may lie in folders below."""
    folder.mkdir(parents=True, exist_ok=True)
    # In reverse: a listing in the order of creation would be unsorted.
    for name in reversed(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def whole_viper(folder: Path) -> None:
    touch(folder / "cam_a", [f"{n:03}_{45 * (n % 3)}.bmp" for n in VIPER_NUMBERS])
    touch(folder / "cam_b", [f"{n:03}_{90 + 45 * (n % 3)}.bmp" for n in VIPER_NUMBERS])


def whole_prid(folder: Path) -> None:
    touch(folder / "cam_a", [f"person_{n:04}.png" for n in range(1, 386)])
    touch(folder / "cam_b", [f"person_{n:04}.png" for n in range(1, 750)])


def whole_grid(folder: Path) -> None:
    # Six cameras, as in the names of the originals.
    touch(folder / "probe", [f"{n:04}_{n % 3 + 1}_25004_1_2_3_4.jpeg" for n in range(1, 251)])
    touch(folder / "gallery", [f"{n:04}_{n % 3 + 4}_25023_1_2_3_4.jpeg" for n in range(1, 251)])
    touch(folder / "gallery", [f"0000_{n % 6 + 1}_{30000 + n}_1_2_3_4.jpeg" for n in range(775)])


def whole_ilids(folder: Path) -> None:
    counts = runpy.run_path(str(in_checkout("scripts/make_splits.py")))["ILIDS_IMAGES"]
    images = enumerate(counts, start=1)
    touch(folder, [f"{pid:04}{image:03}.jpg" for pid, last in images for image in range(1, last + 1)])


SMALL_SETS: dict[str, tuple[KnownDataset, Callable[[Path], None]]] = {
    "viper": (VIPER, whole_viper),
    "prid": (PRID, whole_prid),
    "grid": (GRID, whole_grid),
    "ilids": (ILIDS, whole_ilids),
}


def tiny_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8)).save(path)
    return path


def coloured_people(folder: Path, people: int, shots: int, noise: float, rng: np.random.Generator) -> list[Sample]:
    """So many images of each person in each of two cameras: a colour a person, and noise."""
    samples = []
    for pid in range(1, people + 1):
        colour = rng.integers(60, 200, 3)
        for camid in (1, 2):
            for shot in range(shots):
                pixel = np.clip(colour + rng.normal(0, noise, 3), 0, 255).astype(np.uint8)
                path = folder / f"{pid}_{camid}_{shot}.png"
                Image.fromarray(np.broadcast_to(pixel, (8, 4, 3)).copy()).save(path)
                samples.append(Sample(path, pid, camid))
    return samples


def colours(images: torch.Tensor) -> torch.Tensor:
    """A network that tells `coloured_people` apart: (B, 3, H, W) to (B, 3)."""
    return images.mean(dim=(2, 3))


class Shelf:
    """Puts datasets below a folder.

    Images are links to a few files, so that thousands of them take little room and time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._colours = [root / ".colours" / f"{number}.png" for number in range(COLOURS)]
        self._colours[0].parent.mkdir(parents=True)
        for number, path in enumerate(self._colours):
            Image.new("RGB", (4, 8), (10 * number, 250 - 10 * number, 37 * number % 256)).save(path)
        self._drawn = 0

    def draw(self, folder: str, names: Iterable[str]) -> None:
        """Images of these names, the colours in turn."""
        for name in names:
            path = self.root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.link(self._colours[self._drawn % COLOURS], path)
            self._drawn += 1

    def parts(self, folder: str, parts: dict[str, Sequence[str]]) -> None:
        for part, names in parts.items():
            self.draw(f"{folder}/{part}", names)

    def market(self, folder: str = "Market-1501-v15.09.15") -> None:
        self.parts(folder, MARKET)

    def duke(self) -> None:
        self.parts("DukeMTMC-reID", DUKE)

    def cuhk02(self) -> None:
        self.draw("cuhk02/Dataset", CUHK02)

    def cuhk03(self, boxes: Sequence[str] = ("detected", "labeled")) -> None:
        for box in boxes:
            self.parts(f"CUHK03-NP/{box}", CUHK03)
        if "labeled" in boxes:
            self.draw("CUHK03-NP/labeled/bounding_box_train", ["0002_c2_3.png"])

    def cuhk_sysu(self) -> None:
        self.draw("cuhk_sysu/cropped_images", CUHK_SYSU)

    def msmt17(self, version: str = "V1", folder: str | None = None) -> Path:
        images = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}[version]
        folder = folder or f"MSMT17_{version}"
        for name, lines in MSMT17.items():
            half = images[name in ("list_query.txt", "list_gallery.txt")]
            self.draw(f"{folder}/{half}", [image for _, image in lines])
            text = "".join(f"{image} {pid}\n" for pid, image in lines)
            (self.root / folder / name).write_text(text)
        return self.root / folder

    def small(self, name: str) -> None:
        """VIPeR, PRID, GRID or i-LIDS with every image that its splits name."""
        folder = self.root / SMALL[name]
        SMALL_SETS[name][1](folder)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        self.draw(SMALL[name], files)


def full_shelf(root: Path) -> Shelf:
    """All datasets of all protocols, MSMT17 in its first version."""
    shelf = Shelf(root)
    for put in (shelf.market, shelf.duke, shelf.cuhk02, shelf.cuhk03, shelf.cuhk_sysu, shelf.msmt17):
        put()
    for name in SMALL:
        shelf.small(name)
    return shelf
