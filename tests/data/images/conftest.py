"""Labelled and unlabelled images that their grey tells apart."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dan_fast.data import ReIDDataset, Sample, TrainingSet


@pytest.fixture
def source(tmp_path: Path) -> TrainingSet:
    """Eight labelled images of four persons and six unlabelled ones, each of a grey level of its own."""

    def write(name: str, count: int, start: int) -> ReIDDataset:
        samples = []
        for number in range(count):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 6, (20, 10, 3))
            Image.fromarray((start + 15 * number + noise).astype(np.uint8)).save(path)
            samples.append(Sample(path, number // 2, 1))
        return ReIDDataset(name, tmp_path / name, train=tuple(samples))

    return TrainingSet([write("labeled", 8, 10)], [write("unlabeled", 6, 140)])
