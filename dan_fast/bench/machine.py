"""What is known and measured of the machine: its name, copy bandwidth, and how high memory rises."""

import ctypes
import datetime
import importlib
import os
import platform
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dan_fast
from dan_fast import _extension, triton_kernels
from dan_fast.core.devices import device_name, synchronize
from dan_fast.core.float32 import float32_rounding
from dan_fast.core.heap import heap_in_force

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, as they belong beside every figure."""
    info, root, gpu = _extension.build_info(), Path(dan_fast.__file__).resolve().parents[1], device.type == "cuda"
    # An installed package may lie inside the checkout of another project.
    of_checkout = (root / ".git").exists() and (root / "csrc").is_dir()
    describe = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dan_fast": dan_fast.__version__,
        "commit": _output(*describe) if of_checkout else None,
        "extension": _extension.why_not() or "loaded",
        "extension_source": info.get("source_hash"),
        "compiler": info.get("compiler"),
        "nvcc": info.get("nvcc"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": device_name(torch.device("cpu")),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": CORES,
        "threads": torch.get_num_threads(),
        "float32": float32_rounding(device) or "IEEE",
        "heap": heap_in_force() if device.type == "cpu" else None,
        "gpu": device_name(device) if gpu else None,
        "triton": why_no_triton(device) or importlib.import_module("triton").__version__ if gpu else None,
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def why_no_triton(device: torch.device) -> str | None:
    """Why the passes over a memory run in PyTorch on this GPU though its other kernels run; None if they do not."""
    if device.type != "cuda":
        return None
    return triton_kernels.why_not(torch.cuda.current_device() if device.index is None else device.index)


def _output(*command: str) -> str | None:
    """The first line of what a program prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def cache_flush(device: torch.device) -> Callable[[], Tensor]:
    """Empties the largest cache, a GPU's L2 or that which a CPU's cores share, by writing twice its size."""
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        found = (each.read_text().strip() for each in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
        size = max((int(each[:-1]) * 1024 for each in found if each.endswith("K")), default=32 * 2**20)
    return torch.empty(2 * size, dtype=torch.uint8, device=device).zero_


def yardstick(device: torch.device, problem_bytes: int) -> tuple[Callable[[], Tensor], int]:
    """A copy as long as a problem, within bounds, and the bytes that it reads and writes."""
    source = torch.ones(min(max(problem_bytes, 16 * 2**20), 512 * 2**20) // 4, device=device)
    return partial(torch.empty_like(source).copy_, source), 2 * source.nbytes


def resident_peak() -> int | None:
    """The highest resident memory of this process since it began or since it was reset; None where nothing tells."""
    return _resident("VmHWM")


def _resident(field: str) -> int | None:
    try:
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        return None


def peak_above(device: torch.device, run: Callable[[], object]) -> tuple[object, int | None]:
    """Runs; what that returned, and the bytes that memory rose above where it stood, None where the system cannot tell.

    See `Benchmark.peak_meaning`.
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
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        before = None
    if before is None:
        return run(), None
    result = run()
    return result, max(0, resident_peak() - before)
