"""How much memory can still be had."""

import re
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None if the system does not report it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup, or no limit: "max"
        return available
    return min(available, left)


def why_too_large(device: torch.device, needed: float, what: str) -> str | None:
    """A sentence where `what` would need more bytes than are free."""
    free = free_memory(device)
    if free is None or needed <= free:
        return None
    return f"{what} would need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
