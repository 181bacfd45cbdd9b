"""What is printed on a terminal: plain sentences, and how far a task has got."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

# Sentences are neither broken into lines nor coloured: they contain paths to copy, and names whose brackets and colons
# are no markup.
PLAIN: dict[str, bool] = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}


class LastingConsole(Console):
    """A console that work outlasts: where it can be written to no more, nothing is shown any more."""

    def __exit__(self, *raised: Any) -> None:
        # Here all is written: what is printed, and a bar too, from its own thread and where it ends.
        try:
            super().__exit__(*raised)
        except OSError as error:
            # Before anything else is said, which may come here once more: a bar takes in what goes to stderr.
            self.on_broken_pipe()
            with suppress(OSError):
                said = f"Progress is shown no more: the output cannot be written ({error})."
                print(said, file=getattr(sys.stderr, "rich_proxied_file", sys.stderr))

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What Python still holds for it is not to fail when the process ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def bar_of(console: Console, *columns: ProgressColumn, **options: Any) -> Progress:
    """A bar that takes in, to show it above itself, what goes to a terminal: a file or a pipe keeps what it is sent."""
    taken_in = {f"redirect_{name}": _is_terminal(getattr(sys, name)) for name in ("stdout", "stderr")}
    return Progress(*columns, console=console, **taken_in, **options)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # none, one of another kind, or closed
        return False


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
    # A bar that nobody sees would keep warnings to itself.
    if console.quiet or not console.is_terminal:
        console.print(f"{task} ...", **PLAIN)
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bar_of(console, *columns) as bar:
        shown = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(shown, completed=done, total=total)
