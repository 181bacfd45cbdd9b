"""How much memory is said to be free, where a container limits it."""

from pathlib import Path

import pytest
import torch

from dan_fast.core import free_memory
from dan_fast.core.free_memory import why_too_large

CPU = torch.device("cpu")


def test_pages_of_files_that_were_read_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = Path.read_text
    # One reading for all of the test: what other processes take and free meanwhile may be much.
    of_all = read(Path("/proc/meminfo"))
    monkeypatch.setattr(Path, "read_text", lambda self: of_all if self == Path("/proc/meminfo") else read(self))
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    of_machine, total = free_memory.free_memory(CPU), 1024 * int(of_all.split()[1])
    assert total / 1000 < of_machine <= total
    for name, text in (
        ("max", "1000000\n"),
        ("current", "999000\n"),
        ("stat", "anon 100\nactive_file 20000\ninactive_file 3000\nunevictable 7\nactive_anon 90\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory.free_memory(CPU) == 1000 + 20000 + 3000
    assert why_too_large(CPU, 24000, "it") is None
    assert why_too_large(CPU, 24001, "it") == "it would need about 0.0 GB, 0.0 GB are free"
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory.free_memory(CPU) == of_machine
