"""A trial compile in a process of its own: it can be stopped when it takes too long, which leaves nothing behind.

Stopped inside, the compiler would go on tracing the functions that it had begun with. What a trial that ends in time
has compiled is found again in PyTorch's cache.
"""

import time
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from dan_fast.bench.process import ProcessFailed, in_own_process
from dan_fast.bench.rows import Row


def compile_trial(row: Row, prepare: Callable[..., Callable], budget_s: float, **arguments: Any) -> str | None:
    """Writes into the row how long the first calls take, forward and with backward; or returns why they fail.

    Args:
        row: of a compiled contender.
        prepare: a function of a module; returns what starts the contender's runner.
        budget_s: seconds it may take.
        arguments: of `prepare`, which gets them as JSON has them.
    """
    where = f"{prepare.__module__}:{prepare.__qualname__}"
    try:
        row.compile_seconds = in_own_process(first_calls, budget_s, prepare=where, arguments=arguments)
    except TimeoutError:
        return f"torch.compile took more than {budget_s:.0f} s"
    except ProcessFailed as error:
        return f"torch.compile failed: {error}"
    return None


def first_calls(prepare: str, arguments: dict[str, Any]) -> float:
    """The seconds of the calls in which a contender is compiled."""
    begin = resolve_name(prepare)(**arguments)
    start = time.perf_counter()
    runner = begin()
    runner.outcome()
    runner.run(False)
    return time.perf_counter() - start
