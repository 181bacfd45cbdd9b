"""Rankings by both of their paths."""

import contextlib
from collections.abc import Iterator

import pytest

from dan_fast import _extension


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """By the compiled module, and in PyTorch operations."""
    with _extension.disabled() if request.param == "torch" else contextlib.nullcontext():
        yield request.param
