"""A small gallery, and searches in it."""

import shutil
from pathlib import Path

import pytest

from dan_fast import FeatureExtractor
from dan_fast.data.samples import Sample
from dan_fast.inference.sources import find_images
from tests.support.searches import draw, searched

NAMES = [f"{number:02d}.png" for number in range(12)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A gallery, two of its images twice, and queries."""
    draw(tmp_path / "gallery", NAMES)
    for name, copy in (("03.png", "00-copy.png"), ("05.png", "11-copy.png")):
        shutil.copy(tmp_path / "gallery" / name, tmp_path / "gallery" / copy)
    draw(tmp_path / "queries", ["a.png", "b.png", "c.png"], seed=1)
    return tmp_path


@pytest.fixture
def images(folder) -> tuple[Sample, ...]:
    """Those of the gallery."""
    return find_images([str(folder / "gallery")])[0].samples


@pytest.fixture
def extractor(checkpoint) -> FeatureExtractor:
    return FeatureExtractor(checkpoint, "cpu")


@pytest.fixture
def run(folder, checkpoint):
    def run(*arguments: object, out: str = "out", code: int = 0) -> list[dict]:
        usual = {"--checkpoint": checkpoint, "--gallery": folder / "gallery", "--query": folder / "queries"}
        # A list that is given twice is refused.
        flags = [word for name, value in usual.items() if name not in arguments for word in (name, value)]
        return searched(folder / out, *flags, *arguments, code=code).get("queries", [])

    return run
