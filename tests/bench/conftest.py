"""Benchmarks of tiny problems: how figures are made is tested, not what they are."""

import pytest

from dan_fast.bench import timing


@pytest.fixture(autouse=True)
def caches_stay_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """To write twice what a server's cache holds would take longer than what is timed."""
    monkeypatch.setattr(timing, "cache_flush", lambda device: lambda: None)
