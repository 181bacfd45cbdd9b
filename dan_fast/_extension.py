"""The compiled extension: loads it once, says what it holds and why something of it is missing.

The library is no Python module: loading it registers `torch.ops.dan_fast.*`. Nothing here raises; where the
extension cannot serve, the operators take their PyTorch path and the user is warned once.
"""

import functools
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dan_fast._sources import AGAIN
from dan_fast.core.errors import DanFastError

_INSIDE = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))
LIBRARY = Path(__file__).with_name("_native.so")
BUILD_INFO = Path(__file__).with_name("_build_info.json")
_OPERATORS = (
    "row_sq_norms", "memory_scores", "memory_combine", "memory_commit", "memory_commit_scores_", "memory_scan",
    "memory_scan_backward", "slot_softmax", "slot_softmax_backward", "false_sample_sets", "attention_head",
    "attention_head_backward", "head_refine", "head_refine_backward", "head_adversary", "head_adversary_backward",
)  # fmt: skip
_disabled = 0


@functools.cache
def build_info() -> dict[str, Any]:
    """What setup.py wrote down; empty if dan_fast was not installed but only put on the path.

    Keys: `built`, `ranking`, `cuda_archs`, `instruction_sets`, `missing`, `source_hash`; `rankings`, the source hash of
    each Python's module of the ranking; `compiler`, `nvcc`, `torch_headers` if found.
    """
    try:
        return json.loads(BUILD_INFO.read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def _load() -> str | None:
    """Loads the library; None, or the reason why it is not loaded.

    Raises:
        DanFastError: the environment variable DAN_FAST_ISA names no instruction set.
    """
    if not LIBRARY.is_file():
        missing = [each for each in build_info().get("missing", []) if each.startswith("no compiled extension")]
        return missing[0] if missing else f"the compiled extension was not built; {AGAIN}"
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY} does not load with torch {torch.__version__} ({error}); {AGAIN}"
    if not all(hasattr(torch.ops.dan_fast, name) for name in _OPERATORS):
        return f"{LIBRARY} was built from older sources; {AGAIN}"
    try:
        torch.ops.dan_fast.instruction_set()
    except RuntimeError as error:  # Refused, not done without: DAN_FAST_ISA is no set.
        raise DanFastError(f"{error}.") from None
    return None


def loaded() -> bool:
    """Whether the extension is there and loaded; the first call loads it."""
    return _load() is None


def why_not() -> str | None:
    """One sentence on why the extension is not loaded, None if it is."""
    return _load()


def has_cuda_kernels() -> bool:
    """Whether the loaded extension holds CUDA kernels, whatever GPU there is."""
    return loaded() and torch._C._dispatch_has_kernel_for_dispatch_key("dan_fast::row_sq_norms", "CUDA")


@functools.cache
def why_not_on(device_type: str, index: int | None = None) -> str | None:
    """One sentence on why the kernels do not serve this device, None if they do.

    Args:
        device_type: as in `torch.device(...).type`.
        index: of the CUDA device; the current one if not given.
    """
    if not loaded():
        return why_not()
    if device_type == "cpu":
        return None
    if device_type != "cuda" or torch.version.hip is not None:
        return f"there are no kernels for {'ROCm' if device_type == 'cuda' else device_type}"
    if not has_cuda_kernels():
        missing = build_info().get("missing")
        return missing[0] if missing else f"the extension was built without CUDA kernels; {AGAIN}"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    device = torch.cuda.current_device() if index is None else index
    problem = torch.ops.dan_fast.cuda_problem(device)
    if not problem:
        return None
    archs, gpu = ", ".join(build_info().get("cuda_archs", [])), torch.cuda.get_device_name(device)
    return (
        f"the CUDA kernels, built for {archs}, do not run on {gpu} ({problem}); "
        f"update the driver or set TORCH_CUDA_ARCH_LIST, then {AGAIN}"
    )


@functools.cache
def _warn_once(where: str, reason: str) -> None:
    # At the caller's line, past the frames of the package and of PyTorch.
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"dan_fast takes its PyTorch path on {where}: {reason}", RuntimeWarning, stacklevel=level)


@contextmanager
def disabled() -> Iterator[None]:
    """Inside, operators take their PyTorch path, as where there is no extension, without a warning.

    It holds for the whole process, not for one thread: a backward pass on a GPU runs on threads of its own.
    `torch.compile` takes the answer of the moment when it traces: what is compiled inside must be called inside,
    and a function that was compiled outside keeps its kernels.
    """
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


def enabled() -> bool:
    """Whether we are outside of :func:`disabled`."""
    return not _disabled


@torch.compiler.assume_constant_result
def serves(device_type: str, index: int | None = None) -> bool:
    """Whether the kernels serve this device; warns, once, where a CPU or GPU could have them and has not."""
    if _disabled:
        return False
    reason = why_not_on(device_type, index)
    if reason is not None and device_type in ("cpu", "cuda") and torch.version.hip is None:
        _warn_once(device_type, reason)
    return reason is None
