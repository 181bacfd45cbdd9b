"""Three sets of Street as targets, for networks that have not been trained with it.

    python benchmarks/experiments/street_targets.py data/Street data

writes data/3DPeS.csv, data/CAVIAR4REID.csv and data/SARC3D.csv. The first half of each person's images, in Street's
order, are queries, the rest the gallery. Street does not know cameras: those of queries and gallery are numbered apart,
so that nothing is left out of a list.
"""

import csv
import os
import sys
from collections import defaultdict
from pathlib import Path

from dan_fast.data import load_dataset

SETS = ("3DPeS", "CAVIAR4REID", "SARC3D")


def write_targets(street: Path, folder: Path) -> list[Path]:
    """Write a manifest for each of SETS and say where."""
    persons: dict[str, dict[int, list[Path]]] = {name: defaultdict(list) for name in SETS}
    for sample in load_dataset(street).train:
        name = sample.path.name.rpartition("_")[0]
        if name in persons:
            persons[name][sample.pid].append(sample.path)
    written = []
    for name, images in persons.items():
        written.append(folder / f"{name}.csv")
        with written[-1].open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(("path", "pid", "camid", "split"))
            for pid, paths in images.items():
                for place, path in enumerate(paths):
                    split = "query" if place < len(paths) // 2 else "gallery"
                    rows.writerow((os.path.relpath(path, folder), pid, int(split == "gallery"), split))
    return written


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} STREET FOLDER")
    for manifest in write_targets(*map(Path, sys.argv[1:])):
        print(manifest)
