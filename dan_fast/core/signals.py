"""Ctrl-C and SIGTERM as a request that a loop looks at where it can stop."""

import signal
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """While entered, notes SIGINT and SIGTERM in `requested`; a second SIGINT stops at once.

    Attributes:
        requested: whether this process is to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                # Only the main thread may set handlers; elsewhere the caller stops the run its own way.
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
