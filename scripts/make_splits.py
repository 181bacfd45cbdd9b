"""Draws the ten fixed splits of VIPeR, PRID, GRID and i-LIDS and writes them to dan_fast/data/datasets/splits/*.json.

    python scripts/make_splits.py [FOLDER]

Persons are drawn in the order of the SHA-256 of a text with the seed, the split and the person: the files do not depend
on the version of a library and are the same, bit for bit, on every machine. Their digests, which this prints, stand in
`dan_fast.data.datasets.fixed_splits.DIGESTS`.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SEED = 0
SPLITS = 10
FOLDER = Path(__file__).resolve().parents[1] / "dan_fast/data/datasets/splits"
# Images of the persons 1 to 119 of i-LIDS, 476 in all.
ILIDS_IMAGES = (
    *(4, 4, 3, 3, 4, 4, 2, 2, 4, 4, 5, 5, 3, 3, 7, 7, 2, 2, 6, 6, 3, 3, 6, 6, 8, 8, 6, 6, 5, 3),
    *(8, 8, 5, 5, 7, 7, 6, 6, 6, 6, 3, 6, 6, 6, 5, 5, 3, 3, 3, 4, 4, 5, 5, 4, 4, 3, 3, 3, 3, 3),
    *(3, 4, 4, 5, 5, 3, 3, 3, 3, 3, 3, 3, 3, 5, 5, 4, 4, 4, 4, 6, 6, 4, 4, 2, 2, 2, 2, 3, 3, 2),
    *(2, 2, 2, 2, 2, 2, 2, 6, 6, 2, 2, 2, 2, 2, 4, 4, 4, 3, 3, 4, 3, 3, 5, 5, 2, 3, 3, 4, 4),
)


def draw(items: Iterable[Any], *purpose: Any) -> list[Any]:
    """The items in an order that depends on the purpose only."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{SEED}/{purpose}/{item}".encode()).digest())


def halves(dataset: str, people: range, num_train: int) -> list[dict[str, list[int]]]:
    """Ten times the people, of whom `num_train` are for training and the rest for testing."""
    splits = []
    for number in range(SPLITS):
        order = draw(people, dataset, number)
        splits.append({"train": sorted(order[:num_train]), "test": sorted(order[num_train:])})
    return splits


def ilids() -> list[dict[str, list[Any]]]:
    """59 people for training; of each of the other 60 one image to search for and another one to find."""
    splits = []
    for number, people in enumerate(halves("ilids", range(1, 120), 59)):
        pairs = [
            draw([f"{pid:04}{image:03}" for image in range(1, ILIDS_IMAGES[pid - 1] + 1)], "ilids images", number)[:2]
            for pid in people["test"]
        ]
        query, gallery = map(list, zip(*pairs, strict=True))
        splits.append({"train": people["train"], "query": query, "gallery": gallery})
    return splits


def lists() -> dict[str, list[dict[str, list[Any]]]]:
    """The splits by dataset."""
    return {
        "viper": halves("viper", range(632), 316),
        "prid": halves("prid", range(1, 201), 100),
        "grid": halves("grid", range(1, 251), 125),
        "ilids": ilids(),
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for dataset, splits in lists().items():
        lines = ",\n".join(json.dumps(split) for split in splits)
        content = f'{{"dataset": "{dataset}", "splits": [\n{lines}\n]}}\n'.encode()
        (folder / f"{dataset}.json").write_bytes(content)
        print(dataset, hashlib.sha256(content).hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
