"""Datasets that a test writes as it wants them: a manifest of empty images, CUHK03 with splits of its own."""

import json
from collections.abc import Sequence
from pathlib import Path

from tests.support.dataset_shelf import touch

Split = dict[str, Sequence[str]]


def manifest(folder: Path, **pids: Sequence[int | str]) -> str:
    """The folder, with an image for each person of each split, from two cameras in turn."""
    images = [
        (f"{split}{number}.jpg", pid, number % 2, split) for split in pids for number, pid in enumerate(pids[split])
    ]
    touch(folder, [name for name, *_ in images])
    rows = [",".join(map(str, image)) for image in images]
    (folder / "manifest.csv").write_text("\n".join(["path,pid,camid,split", *rows]) + "\n")
    return str(folder)


def cuhk03_of(home: Path, new: Split, *classic: Split) -> Path:
    """The folder, with the extracted images that the splits name, and torchreid's files of the splits."""
    images = sorted({name for split in (new, *classic) for part in split.values() for name in part})
    for box in ("detected", "labeled"):
        touch(home / f"images_{box}", images)
        # As written on other machines, with labels that restart in every part.
        place = f"/home/somebody/cuhk03/images_{box}/" if box == "detected" else rf"C:\cuhk03\images_{box}" + "\\"
        for protocol, splits in (("new", (new,)), ("classic", classic)):
            content = [
                {part: [[f"{place}{name}", 0, int(name[6]) - 1] for name in names] for part, names in split.items()}
                for split in splits
            ]
            (home / f"splits_{protocol}_{box}.json").write_text(json.dumps(content))
    return home
