"""Ctrl-C, SIGTERM and SIGHUP as a request that a loop looks at where it can stop, or that waits for a few lines."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self


@contextmanager
def interrupts_held() -> Iterator[None]:
    """A context in which no Ctrl-C is raised; one that came meanwhile is raised when it is left.

    Python raises it in the main thread alone, so nothing is done in others; nor where something else than Python's own
    handlers takes the signal.

    Example:
        >>> with interrupts_held():
        ...     done = "both, or neither"
    """
    handler, noted = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return

    def note(*given: Any) -> None:
        noted.append(given)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if noted:
            handler(*noted[0])


class StopRequest:
    """While entered, notes SIGINT, SIGTERM and SIGHUP in `requested`; a second SIGINT stops at once.

    SIGHUP, which a terminal that is closed sends, is left alone where it is ignored, as `nohup` has it.

    Args:
        words: written to standard error at the first SIGINT: what is waited for, and what a second one loses.

    Attributes:
        requested: whether this process is to stop.
    """

    def __init__(self, words: str = "") -> None:
        self._words = words
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        numbers, hangup = [signal.SIGINT, signal.SIGTERM], getattr(signal, "SIGHUP", None)  # Windows lacks the last
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
        for number in numbers:
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                # Only the main thread may set handlers; elsewhere the caller stops the run its own way.
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._words and number == signal.SIGINT:
            with suppress(OSError):  # Past Python's own buffers, in which the signal may have arrived.
                os.write(2, f"\n{self._words}\n".encode())
        self.requested = True
