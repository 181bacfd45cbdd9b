"""A function in a process of its own ends with the process that asked for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dan_fast.bench.process import in_own_process
from tests.support.tiny_training import has_ended, wait_until


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_process_ends_with_its_parent(tmp_path: Path):
    file = tmp_path / "pid"
    parent = os.fork()
    if parent == 0:
        try:
            in_own_process(subprocess.run, args=["sh", "-c", f"echo $PPID $$ > {file}; exec sleep 300"])
        finally:
            os._exit(1)
    wait_until(lambda: file.exists() and file.read_text().endswith("\n"))
    child, of_child = map(int, file.read_text().split())
    try:
        os.kill(parent, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
        wait_until(lambda: has_ended(child), 60)
    finally:
        os.kill(of_child, signal.SIGKILL)
