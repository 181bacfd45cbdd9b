"""Triton kernels for the passes over a memory. Importing this needs no Triton; using it does.

What a machine lacks, Triton itself (Windows, macOS, a CPU wheel of PyTorch) or the C compiler that it runs, `why_not`
says in one sentence.
"""

import functools
import importlib
import importlib.util
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch

from dan_fast.core.errors import DanFastError

__all__ = [
    "Products",
    "float32_products",
    "memory_combine",
    "memory_commit",
    "memory_commit_scores_",
    "memory_scores",
    "products_now",
    "why_not",
]

Products = Literal["float32", "tf32x3"]
# Of the process, not of a thread: PyTorch runs the backward pass of a GPU in threads of its own.
_products: Products = "float32"

# The oldest that the kernels are known to compile with, PyTorch 2.11's.
_OLDEST = (3, 6)


@functools.cache
def why_not(device: int | None = None) -> str | None:
    """One sentence on why the kernels cannot serve, None if they can.

    Args:
        device: index of a CUDA device, to ask about it too; the first time Triton then compiles its launcher.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton` (it exists for Linux only)"
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # a broken installation raises whatever it likes
        return f"Triton does not load ({error}); reinstall it with `pip install --force-reinstall triton`"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        return f"Triton {triton.__version__} is too old; run `pip install 'triton>={wanted}'`"
    if torch.version.hip is not None:
        return "the block sizes of the Triton kernels are chosen for NVIDIA GPUs, this PyTorch is for ROCm"
    if device is None:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} is older than compute capability 8.0, the oldest with bfloat16 and float64 tensor cores"
    with torch.cuda.device(device):
        return _why_no_launcher()


@functools.cache
def _why_no_launcher() -> str | None:
    """One sentence on why Triton cannot build and keep what launches kernels, None if it can.

    It is compiled on the machine: at a kernel's first launch the same would fail inside of an operator, as a traceback.
    """
    try:
        triton = importlib.import_module("triton")
        # The driver builds its helper as it is made, or takes it from the cache folder, where kernels go too.
        _ = triton.runtime.driver.active.utils
        if Path(triton.knobs.cache.dir).is_dir():
            tempfile.TemporaryFile(dir=triton.knobs.cache.dir).close()
    except Exception as error:  # of the driver, the compiler, the folder or the loader
        reason = next(iter(str(error).splitlines()), type(error).__name__).split(". ")[0].rstrip(".!")
        if isinstance(error, subprocess.CalledProcessError):
            # Its text is the whole command; what a compiler has to say it has printed.
            reason = f"{error.cmd[0]} ended with exit status {error.returncode}"
        if "libcuda" in reason or "ldconfig" in reason:
            remedy = "set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"
        elif isinstance(error, (OSError, ImportError)) and not isinstance(error, FileNotFoundError):
            remedy = "set TRITON_CACHE_DIR to a folder that can be written and run programs from"
        else:
            remedy = "install gcc and Python's headers (Debian: `apt-get install gcc python3-dev`)"
        return f"Triton cannot build what launches its kernels ({reason}); {remedy}"
    return None


@contextmanager
def float32_products(kind: Products) -> Iterator[None]:
    """How the kernels multiply float32 numbers meanwhile, in the forward and in the backward pass.

    Args:
        kind: "float32", the default, or "tf32x3": in place of each product three on the tensor cores, of parts of 11
            bits. Under Triton's interpreter scores then err 1.2 times as much as float32's; that tensor cores truncate
            where they add is not in it. Memories in float64 and bfloat16 are multiplied as ever.

    Raises:
        ValueError: another kind.

    Example:
        >>> with float32_products("tf32x3"):
        ...     products_now()
        'tf32x3'
    """
    global _products
    if kind not in get_args(Products):
        raise ValueError(f"kind must be one of {', '.join(get_args(Products))}, got {kind!r}")
    before, _products = _products, kind
    try:
        yield
    finally:
        _products = before


def products_now() -> Products:
    """What `float32_products` has set."""
    return _products


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    reason = why_not()
    if reason is not None:
        raise DanFastError(f"{name} on a GPU needs Triton: {reason}")
    return getattr(importlib.import_module(f"{__name__}.passes"), name)
