"""How much memory can still be had."""

import re
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


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
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        # Pages of files that were read count as used until others need their place.
        cached = re.findall(r"^(?:in)?active_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no cgroup, or no limit: "max"
        return available
    return min(available, limit - used + sum(map(int, cached)))


def why_too_large(device: torch.device, needed: float, what: str) -> str | None:
    """A sentence where `what` would need more bytes than are free."""
    free = free_memory(device)
    if free is None or needed <= free:
        return None
    return f"{what} would need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
