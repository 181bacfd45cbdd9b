"""Two and four processes, shared by the tests of a file."""

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(request.param, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.close()
