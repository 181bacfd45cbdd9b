"""Four processes, and images, shared by the tests of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dan_fast.data.synthetic import synthesize
from tests.support.ranks import Ranks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Four ranks, or as many as `RANKS` of a file says: of four one can be neither first nor last, and have no rows."""
    if "ranks" in metafunc.fixturenames:
        numbers = getattr(metafunc.module, "RANKS", (4,))
        metafunc.parametrize("ranks", numbers, indirect=True, scope="module", ids="{} ranks".format)


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(request.param, tmp_path_factory.mktemp("ranks") / "store") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    synthesize(root, ("campus", "mall"), identities=5, image_size=(32, 16))
    return root
