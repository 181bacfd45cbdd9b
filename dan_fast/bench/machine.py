"""What is known and measured of the machine: its name, free memory, copy bandwidth, and how high memory rises."""

import ctypes
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dan_fast
from dan_fast import _extension
from dan_fast.core.float32 import float32_rounding

PEAK_MEANING = {
    "cpu": (
        "highest resident memory of the process during the run (VmHWM), less what was resident before; it counts "
        "tensors, scratch of libraries and pages that were freed again, after a warm-up and malloc_trim"
    ),
    "cuda": "torch.cuda.max_memory_allocated during the run, less what was allocated before; tensors only",
}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, as they belong beside every figure."""
    info = _extension.build_info()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dan_fast": dan_fast.__version__,
        "commit": _commit(),
        "extension": _extension.why_not() or "loaded",
        "extension_source": info.get("source_hash"),
        "compiler": info.get("compiler"),
        "nvcc": info.get("nvcc"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "float32": float32_rounding(device) or "IEEE",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "driver": _driver() if device.type == "cuda" else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str | None:
    """The commit of the checkout dan_fast lies in, with "-dirty" if files differ from it; None elsewhere."""
    root = Path(dan_fast.__file__).resolve().parents[1]
    # An installed package may lie inside somebody else's checkout.
    if not (root / ".git").exists() or not (root / "csrc").is_dir():
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None if the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup, or no limit: "max"
        return available
    return min(available, left)


def float32_rate(device: torch.device) -> float | None:
    """Float32 operations a second of a GPU, two for each multiply-add, at its highest clock; None for a CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    # NVIDIA's compute capabilities: these have 64 lanes in a multiprocessor, those that came after them 128.
    lanes = 64 if (found.major, found.minor) in ((7, 0), (7, 5), (8, 0)) else 128
    return 2.0 * lanes * found.multi_processor_count * found.clock_rate * 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CacheFlush:
    """Empties the largest cache, a GPU's L2 or that which a CPU's cores share, by writing twice its size."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
        else:
            size = _largest_cpu_cache()
        self.buffer = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


class Copy:
    """The yardstick: `destination.copy_(source)`, which reads and writes `nbytes` each."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.source = torch.ones(nbytes // 4, device=device)
        self.destination = torch.empty_like(self.source)

    @property
    def moved_bytes(self) -> int:
        return 2 * self.source.nbytes

    def run(self) -> None:
        self.destination.copy_(self.source)


def _largest_cpu_cache() -> int:
    """Bytes, as Linux says; 32 MiB where it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 * 2**20)


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def peak_above(device: torch.device, run: Callable[[], object]) -> tuple[object, int | None]:
    """Runs and says how far memory rose above where it stood, in bytes; see PEAK_MEANING.

    Returns:
        `(what run returned, bytes)`; None for the bytes where the system cannot tell.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    try:
        # Freed pages that the allocator keeps would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return run(), None
    result = run()
    return result, max(0, _status("VmHWM") - before)
