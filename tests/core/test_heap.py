"""The heap that commands keep on a CPU: page faults, resident memory, and what is left as the user set it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dan_fast import cli
from dan_fast.bench.process import in_own_process
from dan_fast.core import heap
from dan_fast.core.heap import keep_heap
from tests.support import ROOT

SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")
# Blocks as large as activations are, freed and allocated again.
CHURN = """
import resource
from dan_fast.core.heap import heap_in_force, keep_heap
kept = keep_heap() if {keep} else False
assert (heap_in_force() == "kept") == kept
import numpy as np
def churn():
    return [np.ones(2**22).sum() for _ in range(4)]
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    churn()
usage = resource.getrusage(resource.RUSAGE_SELF)
print(kept, usage.ru_minflt - before, usage.ru_maxrss)
"""


def churned(keep: bool) -> tuple[str, int, int]:
    # A block that is not backed by huge pages has a fault for each of its pages.
    command = [sys.executable, "-c", CHURN.format(keep=keep)]
    left = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    ran = subprocess.run(command, cwd=ROOT, env=left, capture_output=True, text=True, check=True)
    kept, faults, resident = ran.stdout.split()
    return kept, int(faults), int(resident)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the C library is not glibc")
def test_freed_blocks_are_kept():
    kept, faults, resident = churned(keep=True)
    _, faults_before, resident_before = churned(keep=False)
    assert kept == "True" and faults < faults_before / 4
    assert resident < 1.25 * resident_before


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(SETTINGS)]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("nothing_set")
@pytest.mark.parametrize(
    "name, value", [("MALLOC_TRIM_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")]
)
def test_what_the_user_set_is_left(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("the heap was changed"))
    assert heap.why_heap_is_left() == f"{name} is set" and not keep_heap()


@pytest.mark.usefixtures("nothing_set")
def test_another_allocator_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r-xp 00000000 08:01 1 /usr/lib/x86_64-linux-gnu/libjemalloc.so.2\n")
    monkeypatch.setattr(heap, "Path", lambda path: maps)
    assert heap.why_heap_is_left() == "jemalloc is loaded"
    monkeypatch.setattr(heap.os, "confstr_names", {})
    assert heap.why_heap_is_left() == "the C library is not glibc"


@pytest.mark.parametrize("device, asked", [("cpu", 1), ("cuda", 0)])
@pytest.mark.parametrize(
    "command",
    [
        "train --data.labeled missing --run.device",
        "evaluate --checkpoint missing.pt --targets missing --device",
        "extract missing --checkpoint missing.pt --out features.npz --device",
        "search --checkpoint missing.pt --gallery missing --query missing --out found --device",
        "bench data --files 1x1 --device",
    ],
)
def test_commands_ask_once_and_on_a_cpu_only(
    command: str, device: str, asked: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    asks = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heap, "keep_heap", lambda: asks.append(True))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cli.main([*command.split(), device]) == 1
    assert len(asks) == asked


def test_quickstart_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asks = []
    monkeypatch.setattr(heap, "keep_heap", lambda: asks.append(True))
    monkeypatch.setattr("dan_fast.core.devices.resolve_device", lambda device: torch.device("cpu"))
    (tmp_path / "file").write_text("no folder")
    assert cli.main(["quickstart", "--out", str(tmp_path / "file" / "out")]) == 1
    assert len(asks) == 1


@pytest.mark.slow
@pytest.mark.skipif(heap.why_heap_is_left() is not None, reason="the heap is as the user or the system has set it")
@pytest.mark.parametrize("kept", [True, False])
def test_a_process_of_a_benchmark_does_as_its_parent(kept: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heap, "_kept", kept)
    assert in_own_process(heap.heap_in_force) == ("kept" if kept else "not kept")
