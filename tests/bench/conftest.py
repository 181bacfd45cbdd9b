"""Benchmarks of tiny problems: how figures are made is tested, not what they are."""

from collections.abc import Iterator

import pytest

from dan_fast.bench import timing


@pytest.fixture(autouse=True)
def caches_stay_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """To write twice what a server's cache holds would take longer than what is timed."""
    monkeypatch.setattr(timing, "cache_flush", lambda device: lambda: None)


@pytest.fixture(autouse=True)
def products_are_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that the rate of the machine is known at once; it is a rate of nothing, which no other test may get."""
    rate = timing.product_rate
    monkeypatch.setattr(timing, "_PRODUCTS", {"cpu": (1, 64)})
    rate.cache_clear()
    yield
    rate.cache_clear()
