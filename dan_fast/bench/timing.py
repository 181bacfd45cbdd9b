"""Repetitions in turn, their times, and which of the package's operators ran."""

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dan_fast.bench.machine import synchronize

FORWARD, BACKWARD = "forward", "forward_backward"

_Turn = TypeVar("_Turn", bound=Hashable)


@dataclass
class Timing:
    """Seconds a step, one number for each repetition.

    Example:
        >>> Timing([3.0, 1.0, 2.0]).median
        2.0
    """

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper

    def to_dict(self) -> dict[str, Any]:
        lower, upper = self.quartiles
        return {"median": self.median, "q1": lower, "q3": upper, "repeats": len(self.seconds), "all": self.seconds}


def once(device: torch.device, run: Callable[[], object], flush: Callable[[], None] = lambda: None) -> float:
    """Seconds of one run, the device waited for; `flush` comes before and is not timed."""
    flush()
    gc.disable()
    try:
        synchronize(device)
        start = time.perf_counter()
        # What comes back is freed within the time: somebody has to.
        run()
        synchronize(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


def repetitions(first: Mapping[_Turn, float], repeat: int, budget_s: float) -> dict[_Turn, int]:
    """How often each may run, from the seconds that a first run took: as often as the budget allows, once at least."""
    return {turn: min(repeat, max(1, int(budget_s / max(seconds, 1e-9)))) for turn, seconds in first.items()}


def rounds(turns: Mapping[_Turn, int]) -> Iterator[list[_Turn]]:
    """The order of each round: repetitions in turn, so that a noisy neighbour meets all of them.

    Each round begins with another.

    Example:
        >>> list(rounds({"a": 2, "b": 3}))
        [['a', 'b'], ['b', 'a'], ['b']]
    """
    for number in range(max(turns.values(), default=0)):
        due = [turn for turn, count in turns.items() if count > number]
        shift = number % len(due)
        yield due[shift:] + due[:shift]


class Operators(TorchDispatchMode):
    """Which operators of dan_fast run: a row says what it timed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dan_fast":
            self.names.add(func.name().removeprefix("dan_fast::"))
        return func(*args, **(kwargs or {}))
