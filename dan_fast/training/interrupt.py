"""Ctrl-C, SIGTERM and SIGHUP end a run at the end of an iteration, so that it can be saved whole."""

import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

from dan_fast.core.errors import DanFastError
from dan_fast.core.signals import StopRequest
from dan_fast.data.images.workers import is_worker_death
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import largest, rank_in

Batch = TypeVar("Batch")


class TrainingStop(StopRequest):
    """A stop request that ends the batches of a training, on all its ranks after the same iteration.

    Attributes:
        agreed: whether the batches have ended because a process of the run is to stop.
    """

    agreed = False

    def until_requested(
        self, batches: Iterable[Batch], before_error: Callable[[], None], group: ProcessGroup | None = None
    ) -> Iterator[Batch]:
        """The batches until a stop is requested, of this process or of another rank.

        Args:
            batches: from a loader, whose workers are outlived; on all ranks as many.
            before_error: called before an error in a batch is raised, on all ranks, unless a stop is what has ended the
                workers.
            group: the ranks that go through their batches together.
        """
        left = iter(batches)
        self.outlive_workers()
        while True:
            batch, error = None, None
            try:
                batch = None if self.requested else next(left, None)
            except Exception as caught:
                error = None if self.requested and is_worker_death(caught) else caught
            own = 0 if error is None else 1 + rank_in(group)
            stops, failed = largest(group, self.requested, own)
            self.agreed = bool(stops)
            if failed:
                before_error()
                raise error or DanFastError(f"Rank {failed - 1} could not read a batch: see that rank's error.")
            if self.agreed or batch is None:
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

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        try:
            self._previous[number](number, frame)
        except RuntimeError as error:
            if not is_worker_death(error):
                raise
