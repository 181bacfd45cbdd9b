"""What a run says on the terminal."""

import errno
import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from dan_fast.training import display
from dan_fast.training.display import Display


def test_text_is_printed_as_it_is(capsys):
    """Brackets are neither left out nor an error, and a name between colons is no picture."""
    with Display(1, 0, 1) as shown:
        shown.say("x [/y]")
        shown.say("street [day], :car:: mAP 1.0")
    assert capsys.readouterr().out == "x [/y]\nstreet [day], :car:: mAP 1.0\n"


def test_losses_that_a_training_does_not_have_are_left_out(capsys):
    with Display(1, 0, 1) as shown:
        losses = {"total": 0.0, "classification": 0.737, "labeled_embedding": 2.063, "adversary": 0.0, "embedding": 0.0}
        shown.advance(0, {f"train/loss/{name}": value for name, value in losses.items()})
    assert capsys.readouterr().out.endswith(", total 0.000 classification 0.737 labeled_embedding 2.063\n")


def test_a_narrow_window_cuts_the_losses_alone(monkeypatch):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(display, "LastingConsole", lambda quiet: console)
    with Display(3600, 0, 64) as shown:
        shown.advance(11, {"train/loss/total": 1.25, "train/loss/classification": 0.5})
    last = stream.getvalue().rpartition("epoch 12")[2].partition("\n")[0]
    assert "1/3600" in last and "images/s" in last and "0:00:0" in last and last.endswith("…")


def test_rate_and_time_left_are_of_the_iterations_since_it_started(monkeypatch, capsys):
    """Not of those before it was resumed."""
    now = iter([100.0, 110.0, 140.0])
    # The module's alone: another thread may ask for the time as well.
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    with Display(1000, 700, 64) as shown:
        shown.advance(6)
        shown.advance(6)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1:4] for line in lines] == [
        ["iteration 701/1000", "6 images/s", "49.8 min left"],
        ["iteration 702/1000", "3 images/s", "99.3 min left"],
    ]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_where_there_is_no_bar_a_line_comes_now_and_then_and_at_the_end(seconds, monkeypatch, capsys):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", seconds)
    with Display(2, 0, 8) as shown:
        shown.advance(0, {"train/loss/total": 1.25})
        shown.advance(0)
    lines = capsys.readouterr().out.splitlines()
    wanted = ["epoch 1, iteration 1/2", "epoch 1, iteration 2/2"][seconds > 0 :]
    assert [line[:22] for line in lines] == wanted and all(line.endswith("total 1.250") for line in lines)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_training_outlasts_what_reads_its_output(number, capsys):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, "gone")

    with Display(2, 0, 8) as shown:
        shown.console.file = Gone()
        for _ in range(2):
            shown.advance(0, {"train/loss/total": 1.25})
        shown.say("mAP 1.0")
    error = capsys.readouterr().err
    assert error == "" if number == errno.EPIPE else error.count("Progress is shown no more: the output cannot") == 1
