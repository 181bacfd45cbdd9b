"""Ctrl-C and SIGTERM end a run at the end of an iteration, so that it can be saved whole."""

import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

from dan_fast.data.images.workers import is_worker_death

Batch = TypeVar("Batch")


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

    def until_requested(self, batches: Iterable[Batch], before_error: Callable[[], None]) -> Iterator[Batch]:
        """The batches until a stop is requested.

        Args:
            batches: from a loader, whose workers are outlived.
            before_error: called before an error in a batch is raised, unless a stop is what has ended the workers.
        """
        left = iter(batches)
        self.outlive_workers()
        while not self.requested:
            try:
                batch = next(left, None)
            except Exception as error:
                if self.requested and is_worker_death(error):
                    return
                before_error()
                raise
            if batch is None:
                return
            yield batch

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
