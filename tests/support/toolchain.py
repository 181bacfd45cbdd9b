"""What this machine can compile and run: marks that skip the rest, and programs made of the kernels' bodies."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dan_fast import _extension
from tests.support import ROOT, in_checkout

COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler on this machine")
needs_extension = pytest.mark.skipif(not _extension.loaded(), reason=f"no extension: {_extension.why_not()}")
needs_cuda_kernels = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without CUDA"
)


def build_on_host(source: str, target: Path, *flags: str) -> Path:
    """The program `target` of `source`, a path below tests/kernels."""
    in_checkout("csrc")
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    command = [COMPILER, "-std=c++17", *warnings, "-ffp-contract=off", "-pthread", *flags]
    subprocess.run([*command, ROOT / "tests/kernels" / source, "-o", target, "-ldl"], check=True)
    return target


def library_on_host(source: str, folder: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(build_on_host(source, folder / "kernels.so", "-O1", "-shared", "-fPIC")))


def call_on_host(
    library: ctypes.CDLL, name: str, maps: Sequence[Tensor], tensors: Sequence[Tensor | None], *numbers: Sequence[int]
) -> None:
    """A kernel `name`_`dtype` of maps: it takes numbers, the strides of `maps` and pointers to `tensors`."""
    strides = [step for x in maps for step in (*x.stride()[:2], position_step(x))]
    first, *others = ((ctypes.c_int64 * len(values))(*values) for values in (numbers[0], strides, *numbers[1:]))
    pointers = (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))
    getattr(library, f"{name}_{str(maps[0].dtype).removeprefix('torch.')}")(first, *others, pointers)


def position_step(x: Tensor) -> int:
    """From one position of a map to the next."""
    step = x.stride(3) if x.shape[3] > 1 else x.stride(2)
    return 1 if x.shape[2:].numel() == 1 else step


class Guarded:
    """Outputs for a kernel: full of rubbish, each between numbers that must stay as they are."""

    def __init__(self) -> None:
        self._around: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        whole = torch.full((size + 8,), 77, dtype=dtype)
        if dtype != torch.uint8:
            whole[4 : 4 + size] = torch.nan if dtype.is_floating_point else -7
        self._around += [whole[:4], whole[-4:]]
        return whole[4 : 4 + size].view(shape)

    def like(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [self.empty(x.shape, x.dtype) for x in tensors]

    def map_like(self, x: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
        """A map (B, C, H, W) amid other channels, laid out as `x` or as is said; packs of it are aligned."""
        own = torch.contiguous_format if position_step(x) == 1 else torch.channels_last
        batch, channels, height, width = x.shape
        wide = x.new_full((batch, channels + 16, height, width), 77).contiguous(memory_format=memory_format or own)
        self._around += [wide[:, :8], wide[:, -8:]]
        return wide[:, 8:-8].fill_(torch.nan)

    def assert_untouched(self) -> None:
        assert all((x == 77).all() for x in self._around), "written beyond an output"


def why_no_sanitizer(flag: str) -> str | None:
    """The compiler may come without the sanitizer's library."""
    probe = [COMPILER, "-x", "c++", flag, "-", "-o", os.devnull]
    works = subprocess.run(probe, input="int main() {}", capture_output=True, text=True).returncode == 0
    return None if works else f"the compiler has no {flag}"


def run_under_sanitizer(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer cannot place its shadow memory under some settings of address randomisation.
    unrandomised = [shutil.which("setarch"), os.uname().machine, "-R"] if shutil.which("setarch") else []
    environment = os.environ | {
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0 exitcode=67",
        "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
    }
    # setarch may be forbidden in a container, where the program then runs as it is.
    if unrandomised and subprocess.run([*unrandomised, "true"], capture_output=True).returncode != 0:
        unrandomised = []
    return subprocess.run([*unrandomised, program, *arguments], capture_output=True, text=True, env=environment)
