"""The device that a setting names, its model, and waiting for it."""

import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from dan_fast.core.errors import DanFastError
from dan_fast.core.launched import local_rank, local_ranks, number_of_ranks


def resolve_device(name: str) -> torch.device:
    """The device a setting names; "auto" is the GPU where there is one, of several ranks on a machine one for each.

    Raises:
        DanFastError: not a device, one this machine lacks, the same GPU for several ranks, or more ranks than GPUs.
    """
    ranks = number_of_ranks()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks > 1 and name.startswith("cuda:"):
        raise DanFastError(f"The device {name} cannot serve {ranks} ranks: set it to cuda, and each takes its own GPU.")
    if ranks > 1 and name == "cuda":
        name = f"cuda:{_own_gpu()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DanFastError(f"{name!r} is no device: use auto, cpu, cuda or cuda:1.") from error
    if device.type not in ("cpu", "cuda"):
        raise DanFastError(f"The device {name} is not supported: use auto, cpu, cuda or cuda:1.")
    # The index of a torch.device has eight bits: cuda:256 would be cuda:0.
    if device.type == "cuda" and int(str(name).partition(":")[2] or 0) >= torch.cuda.device_count():
        raise DanFastError(
            f"There is no device {name}, {torch.cuda.device_count()} GPUs are visible: use auto or cpu, "
            "or see `dan-fast doctor`."
        )
    return device


def _own_gpu() -> int:
    """The visible GPU that this rank takes: the one of its number or, where its launcher shows it only one, that."""
    visible = torch.cuda.device_count()
    if visible == 1:
        return 0
    if 1 < visible < local_ranks():
        raise DanFastError(
            f"{local_ranks()} ranks on this machine cannot share {visible} GPUs: start as many ranks as GPUs are "
            "visible, or set the device to cpu."
        )
    return local_rank()


def device_name(device: torch.device) -> str:
    """The model of a GPU or of the machine's CPU, as the system names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for the work that a GPU was given; a CPU has none left."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
