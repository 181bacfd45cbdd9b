"""Which signals stop, and which errors of a batch a stop request excuses."""

import os
import signal
from collections.abc import Iterator

import pytest

from dan_fast.core.errors import DanFastError
from dan_fast.core.signals import StopRequest, interrupts_held
from dan_fast.training.interrupt import TrainingStop

# As PyTorch's loader writes it.
WORKER_DEATH = RuntimeError("DataLoader worker (pid 71) is killed by signal: Terminated.")


def batches(stop: TrainingStop, error: Exception, requested: bool) -> Iterator[int]:
    """One batch, then an error, a stop being requested or not while the second is fetched."""
    yield 1
    stop.requested = requested
    raise error


def test_the_death_of_a_worker_is_a_stop_where_one_is_requested():
    stop = TrainingStop()
    left = stop.until_requested(batches(stop, WORKER_DEATH, requested=True), before_error=pytest.fail)
    assert list(left) == [1] and stop.agreed


@pytest.mark.parametrize(
    "error, requested",
    [(WORKER_DEATH, False), (DanFastError("The image a.jpg cannot be decoded."), True), (RuntimeError("other"), True)],
)
def test_any_other_error_is_raised_once_it_was_announced(error, requested):
    stop, announced = TrainingStop(), []
    left = stop.until_requested(batches(stop, error, requested), before_error=lambda: announced.append("now"))
    with pytest.raises(type(error)) as raised:
        list(left)
    assert raised.value is error and announced == ["now"]


def test_no_batch_is_fetched_after_a_request():
    stop = TrainingStop()
    stop.requested = True
    assert list(stop.until_requested(iter([1, 2]), pytest.fail)) == [] and stop.agreed


def test_only_a_second_ctrl_c_stops_at_once_and_what_is_ignored_stays_so():
    """As `nohup` has it of a terminal that is closed, and a shell of Ctrl-C for what runs in its background."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
