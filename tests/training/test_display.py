"""What a run says on the terminal."""

import pytest

from dan_fast.training import display
from dan_fast.training.display import Display


def test_text_is_printed_as_it_is(capsys):
    """Brackets are neither left out nor an error, and a name between colons is no picture."""
    with Display(1, 0, 1) as shown:
        shown.say("x [/y]")
        shown.say("street [day], :car:: mAP 1.0")
    assert capsys.readouterr().out == "x [/y]\nstreet [day], :car:: mAP 1.0\n"


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_where_there_is_no_bar_a_line_comes_now_and_then_and_at_the_end(seconds, monkeypatch, capsys):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", seconds)
    with Display(2, 0, 8) as shown:
        shown.advance(0, {"train/loss/total": 1.25})
        shown.advance(0)
    lines = capsys.readouterr().out.splitlines()
    wanted = ["epoch 1, iteration 1/2", "epoch 1, iteration 2/2"][seconds > 0 :]
    assert [line[:22] for line in lines] == wanted and all(line.endswith("total 1.250") for line in lines)
