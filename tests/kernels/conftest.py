from collections.abc import Iterator

import pytest

from tests.support.running import new_memory_poisoned


@pytest.fixture
def poison() -> Iterator[None]:
    with new_memory_poisoned():
        yield
