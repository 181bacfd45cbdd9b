"""What this machine can compile and run: marks that skip the rest, and programs made of the kernels' bodies."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
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
    subprocess.run([*command, ROOT / "tests/kernels" / source, "-o", target], check=True)
    return target


def library_on_host(source: str, folder: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(build_on_host(source, folder / "kernels.so", "-O1", "-shared", "-fPIC")))


class Guarded:
    """Outputs for a kernel: full of rubbish, each between numbers that must stay as they are."""

    def __init__(self) -> None:
        self._wholes: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        whole = torch.full((size + 8,), 77, dtype=dtype)
        if dtype != torch.uint8:
            whole[4 : 4 + size] = torch.nan if dtype.is_floating_point else -7
        self._wholes.append(whole)
        return whole[4 : 4 + size].view(shape)

    def assert_untouched(self) -> None:
        assert all((x[:4] == 77).all() and (x[-4:] == 77).all() for x in self._wholes), "written beyond an output"


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
