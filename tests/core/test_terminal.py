"""Progress of a command: a bar on a terminal, one plain line elsewhere."""

import io

from rich.console import Console

from dan_fast.core.terminal import progress_line


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
