"""What is printed on a terminal: plain sentences, and how far a task has got."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Sentences are neither broken into lines nor coloured: they contain paths to copy, and names whose brackets and colons
# are no markup.
PLAIN: dict[str, bool] = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}


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
