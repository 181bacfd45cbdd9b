"""What this machine has to build with: a C++ compiler, nvcc, a torch and its headers; setup.py imports this."""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
SOURCES = runpy.run_path(str(ROOT / "dan_fast/_sources.py"))
AGAIN = SOURCES["AGAIN"]
OLDEST_TORCH = (2, 11)
# Where no GPU is visible: its code runs on 8.6 and 8.9 as it is, and newer GPUs translate its PTX.
PORTABLE_CUDA_ARCH = "8.0+PTX"
NAMED_CUDA_ARCHS = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0+PTX",
}


class Torch(NamedTuple):
    """An installed PyTorch whose headers can be compiled against."""

    version: str
    folder: Path


class CannotBuild(Exception):
    """One sentence: what is missing and what to do about it."""


def printed_by(command: list[str]) -> str:
    """What a program writes to its standard output, whatever its exit status.

    Raises:
        CannotBuild: it cannot be executed, as one for another processor.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    except OSError as error:
        raise CannotBuild(
            f"{command[0]} cannot be executed ({error.strerror}); repair or remove it, then {AGAIN}"
        ) from error


def find_torch() -> Torch | None:
    """A torch >= 2.11 of the build environment or of the one that is installed into; it is not imported.

    pip hides the latter from an isolated build, but its headers are as good and already there.
    """
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    folders += [os.path.join(sysconfig.get_path(kind), "torch") for kind in ("platlib", "purelib")]
    for folder in map(Path, folders):
        version_file = folder / "version.py"
        found = version_file.is_file() and re.search(
            r"__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", version_file.read_text()
        )
        if not found or (int(found[2]), int(found[3])) < OLDEST_TORCH:
            continue
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return Torch(found[1], folder)
    return None


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX if it is set, else the first of the usual names on PATH."""
    if sys.platform != "linux":
        raise CannotBuild("the compiled extension is built on Linux only")
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise CannotBuild(f"CXX is no command ({error}); correct or unset it, then {AGAIN}") from error
    if chosen and shutil.which(chosen[0]) is None:
        raise CannotBuild(f"CXX names {chosen[0]}, which was not found; install it or unset CXX, then {AGAIN}")
    if chosen and os.sep in chosen[0]:
        chosen[0] = os.path.abspath(chosen[0])  # ninja runs in another folder
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) is not None:
            return command
    raise CannotBuild(f"no C++ compiler was found; install g++ (Debian: apt-get install g++), then {AGAIN}")


def find_nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        nvcc = shutil.which(candidate)
        if nvcc is not None:
            return os.path.abspath(nvcc)
    raise CannotBuild(
        f"nvcc was not found; if there is a GPU, install the CUDA toolkit, put nvcc on PATH, then {AGAIN}"
    )


def cuda_archs(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as a list like ["8.6", "9.0+PTX"]; without it the visible GPUs or else the portable one."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not wanted:
        known = printed_by([nvcc, "--list-gpu-code"]).split()
        visible = visible_gpus()
        if visible and float(visible[0]) >= 8 and all("sm_" + arch.replace(".", "") in known for arch in visible):
            return visible
        # A GPU that nvcc does not know yet translates PTX; one before 8.0 runs neither.
        return [PORTABLE_CUDA_ARCH]
    for name, numbers in NAMED_CUDA_ARCHS.items():
        wanted = re.sub(rf"\b{name}\b", numbers, wanted)
    archs = re.split(r"[\s;,]+", wanted.strip(" ;,"))
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise CannotBuild(
                f"TORCH_CUDA_ARCH_LIST holds {arch!r}, no compute capability such as 8.6 or 9.0+PTX; "
                f"correct or unset it, then {AGAIN}"
            )
    return list(dict.fromkeys(archs))


def visible_gpus() -> list[str]:
    """The compute capabilities of the GPUs that the driver shows, such as ["8.6"], each once, in their order."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = printed_by(asked)
    except CannotBuild:
        return []
    # What it writes where there is no driver, or an old one that does not know the question, is no capability.
    found = {line.strip() for line in answer.splitlines() if re.fullmatch(r"\d+\.\d", line.strip())}
    return sorted(found, key=float)


def python_headers() -> Path:
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").is_file():
        raise CannotBuild(f"{folder} has no Python.h; install Python's headers (Debian: python3-dev), then {AGAIN}")
    return folder


def first_line(command: list[str], pattern: str = ".+") -> str:
    """The first line of `command --version` that matches, as the name of a compiler."""
    found = re.search(pattern, printed_by([*command, "--version"]))
    return found[0].strip() if found else command[0]


def build_requirements() -> list[str]:
    """torch, some gigabytes, only where it is needed and not there already."""
    try:
        find_compiler()
    except CannotBuild:
        return []
    return [] if find_torch() else [f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]
