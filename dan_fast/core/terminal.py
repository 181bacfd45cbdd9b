"""What is printed on a terminal: plain sentences, and how far a task has got."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Sentences are neither broken into lines nor coloured: they contain paths to copy, and names whose brackets and colons
# are no markup.
PLAIN: dict[str, bool] = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}


class LastingConsole(Console):
    """A console that work outlasts: where it can be written to no more, nothing is shown any more."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            with suppress(OSError):
                print(f"Progress is shown no more: the output cannot be written ({error}).", file=sys.stderr)
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What Python still holds for it is not to fail when the process ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


@contextmanager
def progress_line(console: Console, task: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far a task has got: a bar on a terminal, one line at its start elsewhere.

    Args:
        console: where to print to.
        task: what is going on, in a few words.

    Yields:
        A function to call with (items done, items in all).

    Example:
        >>> with progress_line(Console(), "Counting") as show:
        ...     show(1, 2)
        Counting ...
    """
    if not console.is_terminal:
        console.print(f"{task} ...", **PLAIN)
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(shown, completed=done, total=total)
