"""Every function has two forms, and the fast one two paths; most tests hold for all of them."""

from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType

import pytest

from dan_fast import _extension, functional, reference


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def impl(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.fixture(params=["kernels", "form"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The fast functions by their kernels and, as without them and in a transform, by their PyTorch forms."""
    with _extension.disabled() if request.param == "form" else nullcontext():
        yield request.param


@pytest.fixture(params=["reference", "kernels", "form"])
def by(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Both implementations, the fast one by each path."""
    with _extension.disabled() if request.param == "form" else nullcontext():
        yield reference if request.param == "reference" else functional
