"""Which errors of a batch a stop request excuses."""

from collections.abc import Iterator

import pytest

from dan_fast.core.errors import DanFastError
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
