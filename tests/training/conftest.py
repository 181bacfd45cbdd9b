"""The images that the trainings of these tests share."""

from pathlib import Path

import pytest

from dan_fast.data.synthetic import synthesize


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, campus and mall, of four training and two test persons with four images each."""
    root = tmp_path_factory.mktemp("images")
    synthesize(root, ["campus", "mall"], identities=6, cameras=2, images_per_camera=2, image_size=(32, 32), seed=1,
               test_fraction=0.34)  # fmt: skip
    return root
