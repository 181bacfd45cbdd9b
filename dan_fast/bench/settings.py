"""What the sub-commands of `dan-fast bench` have in common."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from dan_fast.bench.timing import Timing
from dan_fast.core.errors import DanFastError

DTYPES = ("float32", "bfloat16", "float16", "float64")


def one_of(option: str, text: str, choices: Sequence[str]) -> list[str]:
    """The words of an option, with commas between, each once.

    Raises:
        DanFastError: one is not among the choices; names the option.
    """
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in choices:
            raise DanFastError(f"{option}: {word!r} is not one of {', '.join(choices)}.")
    return list(dict.fromkeys(words))


def dtypes_of(text: str) -> list[torch.dtype]:
    """The types of `--dtype float32,bfloat16`."""
    return [getattr(torch, name) for name in one_of("dtype", text, DTYPES)]


def output_console(console: Console | None) -> Console:
    """Wide enough for the tables where the output goes into a file."""
    return console or (Console() if Console().is_terminal else Console(width=200))


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """PyTorch's CPU threads inside; 0 leaves its own number."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def milliseconds(timing: Timing | None) -> str:
    """The cell of a table: median (quartiles, repetitions)."""
    if timing is None:
        return "-"
    median, lower, upper = (f"{seconds * 1e3:.4g}" for seconds in (timing.median, *timing.quartiles))
    return f"{median} ({lower}..{upper}, n={len(timing.seconds)})"


def print_environment(console: Console, environment: dict[str, Any]) -> None:
    found = {name: value for name, value in environment.items() if value is not None}
    console.print(escape(", ".join(f"{name} {value}" for name, value in found.items())), highlight=False)
