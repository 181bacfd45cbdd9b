import ctypes
from collections.abc import Iterator

import pytest

from tests.support.running import new_memory_poisoned
from tests.support.toolchain import library_on_host


@pytest.fixture
def poison() -> Iterator[None]:
    with new_memory_poisoned():
        yield


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels of the file that `SOURCE` of a module names, on host threads."""
    return library_on_host(request.module.SOURCE, tmp_path_factory.mktemp("host"))
