"""The changes by name, and whether each has had an effect."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Change = Callable[[], Any]
CHANGES: dict[str, Change] = {}
# The changes that have had an effect.
HAD: set[str] = set()


def change(function: Callable[[], Iterator[None]]) -> Change:
    """Make a generator function a context, known by its name."""
    CHANGES[function.__name__] = contextmanager(function)
    return CHANGES[function.__name__]
