"""`run.deterministic`: the same bits in every run on one kind of GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dan_fast.core.errors import DanFastError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# Those that cuBLAS repeats itself with, according to its manual.
_FIXED = (":4096:8", ":16:8")


def prepare_cublas() -> None:
    """Give cuBLAS a workspace with which it repeats itself; to be called before the GPU is used.

    Raises:
        DanFastError: the environment says otherwise, or the GPU is in use already, when it is too late.
    """
    found = os.environ.get(_WORKSPACE)
    if found in _FIXED:
        return
    if found is not None or torch.cuda.is_initialized():
        state = f"is {found}" if found is not None else "is not set and the GPU is in use already"
        raise DanFastError(
            f"run.deterministic needs {_WORKSPACE}, which {state}: set it to {_FIXED[0]} before the program starts."
        )
    os.environ[_WORKSPACE] = _FIXED[0]


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Where wanted, let PyTorch use only operators that repeat themselves, and leave the process as it was afterwards.

    Raises:
        DanFastError: an operator has no such form; names it.
    """
    if not wanted:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills, tries = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    # It would write every new tensor twice; nothing here reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False
    # What is fastest in one run need not be in the next.
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        operator, known, _ = str(error).partition(" does not have a deterministic implementation")
        if not known:
            raise
        raise DanFastError(
            f"run.deterministic cannot be kept, {operator} gives other bits in every run: set it to false or choose "
            "another model."
        ) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = tries
