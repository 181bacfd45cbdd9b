"""Progress of a command: a bar on a terminal, one plain line elsewhere."""

import errno
import io
import sys

import pytest
from rich.console import Console

from dan_fast.core.terminal import LastingConsole, progress_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(Terminal):
    """A terminal whose window has been closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "gone")


@pytest.fixture
def of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests run in."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_elsewhere_a_task_is_one_line_however_often_it_is_updated():
    console = Console(file=io.StringIO(), width=20)
    with progress_line(console, "Testing the network on [a b] /a/long/path") as show:
        for done in range(100):
            show(done, 100)
    assert console.file.getvalue() == "Testing the network on [a b] /a/long/path ...\n"


def test_on_a_terminal_a_bar_shows_what_is_done_of_all():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with progress_line(console, "Drawing") as show:
        show(3, 4)
    assert "Drawing" in console.file.getvalue() and "3/4" in console.file.getvalue()


@pytest.mark.usefixtures("of_a_window")
def test_a_bar_takes_in_what_goes_to_its_terminal_and_nothing_else(monkeypatch):
    streams = {"stdout": io.StringIO(), "stderr": Terminal()}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    line = "to be kept as it is " * 10
    with progress_line(LastingConsole(stderr=True), "Testing") as show:
        show(1, 2)
        print(line)
        print("a warning", file=sys.stderr)
    assert streams["stdout"].getvalue() == f"{line}\n"
    # Above the bar, which is drawn once more below it.
    assert "Testing" in streams["stderr"].getvalue().partition("a warning\n")[2]
    assert (sys.stdout, sys.stderr) == tuple(streams.values())


@pytest.mark.usefixtures("of_a_window")
@pytest.mark.parametrize("stream", [None, object()], ids=["none", "of another kind"])
def test_a_bar_needs_no_other_stream(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_line(LastingConsole(stderr=True), "Testing") as show:
        show(1, 2)
    assert "1/2" in terminal.getvalue() and sys.stdout is stream


@pytest.mark.usefixtures("of_a_window")
def test_a_rank_that_shows_nothing_keeps_no_warning_to_itself(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_line(LastingConsole(stderr=True, quiet=True), "Testing") as show:
        show(1, 2)
        print("a warning", file=sys.stderr)
    assert terminal.getvalue() == "a warning\n"


@pytest.mark.usefixtures("of_a_window")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_work_outlasts_a_terminal_that_is_gone(name, monkeypatch):
    """Its bar too, which is written by a thread of its own and at its end; what is said of it is said once."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys, name, gone := Gone())
    console, done = LastingConsole(stderr=name == "stderr"), []
    with progress_line(console, "Testing") as show:
        show(1, 2)
        console.print("a line above it")
        done.append(1)
    console.print("a line below it")
    assert done and console.quiet and getattr(sys, name) is gone
    if name == "stdout":
        assert sys.stderr.getvalue().count("Progress is shown no more: the output cannot be written") == 1
