"""What a benchmark requires, and whether it was met."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dan_fast.core.errors import DanFastError


class Bar(NamedTuple):
    """A requirement, its limit as a sentence, the figure (None if it was not measured), and whether it is met."""

    name: str
    limit: str
    value: float | None
    met: bool

    @property
    def verdict(self) -> str:
        return "not measured" if self.value is None else "met" if self.met else "NOT met"

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"verdict": self.verdict}


def at_least(name: str, least: float, value: float | None) -> Bar:
    """A ratio that must not be smaller."""
    return Bar(name, f"at least {least:g} times", value, value is not None and value >= least)


def at_most(name: str, limit: str, most: float, value: float | None) -> Bar:
    """A figure that must not be larger; `limit` says so in its unit."""
    return Bar(name, limit, value, value is not None and value <= most)


def all_met(bars: Sequence[Bar], check: bool) -> bool:
    """Whether every bar is met.

    Raises:
        DanFastError: with `check`, one is not.
    """
    missed = [bar for bar in bars if not bar.met]
    if check and missed:
        names = "; ".join(f"{bar.name}: {bar.verdict}" for bar in missed)
        raise DanFastError(f"{len(missed)} of {len(bars)} bars are missed: {names}.")
    return not missed
