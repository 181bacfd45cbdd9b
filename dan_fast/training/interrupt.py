"""Ctrl-C and SIGTERM end a run at the end of an iteration, so that it can be saved whole."""

import signal
from types import FrameType, TracebackType

from dan_fast.data.images.workers import is_worker_death


class StopRequest:
    """While entered, notes SIGINT and SIGTERM in `requested`; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
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

    def outlive_workers(self) -> None:
        """Keep the death of a loader's worker out of the middle of an iteration; call it once the loader has any.

        PyTorch raises it from a SIGCHLD handler, wherever the main thread is. The loader raises it too, in the place
        of the batch that the worker owes.
        """
        number = getattr(signal, "SIGCHLD", None)  # which Windows has not
        if number is not None and self._previous and number not in self._previous:
            if callable(signal.getsignal(number)):
                self._previous[number] = signal.signal(number, self._pass_on)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        try:
            self._previous[number](number, frame)
        except RuntimeError as error:
            if not is_worker_death(error):
                raise
