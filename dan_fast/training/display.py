"""The progress of a run on the terminal: a bar where there is one, a line now and then where there is none."""

import time
from collections.abc import Iterable

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from dan_fast.core.terminal import PLAIN, LastingConsole, bar_of

SECONDS_BETWEEN_LINES = 30.0
_LOSSES = ("total", "classification", "labeled_embedding", "adversary", "embedding", "regularizer")
_BAR = 20


class Display:
    """A progress bar with losses, images/s and time left.

    Args:
        total: iterations of the whole run.
        done: iterations already done when it continues.
        images_per_iteration: images of a mini-batch.
        shown: whether anything is printed: one of several ranks does.
    """

    def __init__(self, total: int, done: int, images_per_iteration: int, shown: bool = True) -> None:
        self.console = LastingConsole(quiet=not shown)
        self._images = images_per_iteration
        self._total, self._done, self._first = total, done, done
        self._started = self._last_line = time.monotonic()
        self._losses = ""
        self._progress = bar_of(
            self.console,
            TextColumn("{task.description}"),
            BarColumn(_BAR),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            # The first to be cut in a narrow window.
            TextColumn("{task.fields[losses]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            expand=True,
            disable=not (shown and self.console.is_terminal),
        )
        self._task = self._progress.add_task("training", total=total, completed=done, rate="", losses="")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def advance(self, epoch: int, means: dict[str, float] | None = None) -> None:
        """One more iteration is done; `means` are new scalars, if any."""
        self._done += 1
        if means:
            losses = {name: means[f"train/loss/{name}"] for name in _LOSSES if f"train/loss/{name}" in means}
            # Of the others those that the training has.
            self._losses = " ".join(
                f"{name} {value:.3f}" for name, value in losses.items() if name == "total" or value != 0
            )
        now = time.monotonic()
        rate = (self._done - self._first) * self._images / max(now - self._started, 1e-9)
        self._progress.update(
            self._task,
            completed=self._done,
            description=f"epoch {epoch + 1}",
            rate=f"{rate:.0f} images/s",
            losses=self._losses,
        )
        if not self.console.is_terminal and (
            now - self._last_line >= SECONDS_BETWEEN_LINES or self._done == self._total
        ):
            self._last_line = now
            left = (self._total - self._done) * self._images / rate
            self.console.print(
                f"epoch {epoch + 1}, iteration {self._done}/{self._total}, {rate:.0f} images/s, "
                f"{left / 60:.1f} min left, {self._losses}",
                **PLAIN,
            )

    def tell_skipped(self, paths: Iterable[str], known: set[str]) -> None:
        """Add images that cannot be decoded to those known, and say those that are new."""
        for path in paths:
            if path not in known:
                known.add(path)
                self.say(f"Skipped {path}: it cannot be decoded.")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, **PLAIN)
