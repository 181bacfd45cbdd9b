"""A small search by the command, of drawn images and an untrained network."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dan_fast import FeatureExtractor
from dan_fast.cli import main
from dan_fast.data.synthetic import synthesize
from tests.support.untrained import untrained_checkpoint


def draw(folder: Path, names: list[str], seed: int = 0) -> Path:
    """Noise images with these names, of which all have as many bytes."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        before = (folder / name).stat() if (folder / name).exists() else None
        Image.fromarray(random.integers(0, 256, (24, 14, 3), dtype=np.uint8)).save(folder / name)
        if before is not None:
            # Another image has another time, even where the file system's clock has not ticked since.
            os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    return folder


def stopped_at(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when a network has embedded so many batches."""
    batches = FeatureExtractor.batches

    def until(self, images):
        for number, rows in enumerate(batches(self, images)):
            if number == batch:
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(FeatureExtractor, "batches", until)


def searched(out: Path, *arguments: object, code: int = 0) -> dict[str, Any]:
    """Runs `dan-fast search` and gives its lists; {} where it left none."""
    flags = ["--out", out, "--device", "cpu", "--workers", 0, "--batch_size", 4]
    assert main(["search", *map(str, [*flags, *arguments])]) == code
    return json.loads((out / "ranked.json").read_text()) if (out / "ranked.json").exists() else {}


def search_page(folder: Path) -> Path:
    """The page of a search for drawn persons, with known identities, one query that cannot be decoded and odd names."""
    synthesize(folder, ["street"], identities=6, cameras=2, image_size=(32, 16), test_fraction=0.5)
    odd = draw(folder / "odd", ['<b> & "quotes" #1%20.png', os.fsdecode(b"no\xffutf8.png")])
    (odd / "broken.png").write_bytes(b"no image")
    checkpoint = untrained_checkpoint(folder / "checkpoint.pt", model={"attention": "nl_cbam"})
    street = folder / "street"
    flags = ["--checkpoint", checkpoint, "--gallery", street, odd, "--query", street, odd]
    searched(folder / "out", *flags, "--top", 5, "--broken_images", "skip")
    return folder / "out" / "index.html"


def paths_of(lists: list[dict]) -> list[list[str]]:
    """What each list found."""
    return [[match["path"] for match in each["matches"] or ()] for each in lists]


def clustered(count: int, size: int = 32) -> np.ndarray:
    """Features, ten about each of some centres."""
    random = np.random.default_rng(2)
    centres = random.standard_normal((count // 10, size))
    return torch.nn.functional.normalize(
        torch.from_numpy(centres[np.arange(count) % len(centres)] + 0.4 * random.standard_normal((count, size)))
    ).to(torch.float32).numpy()  # fmt: skip
