#!/usr/bin/env python
"""The registers, shared memory and spills of every CUDA kernel, as the compiler reports them: no GPU is needed.

    python scripts/kernel_resources.py [--arch 8.6 9.0] [FILE.cu ...]

A kernel that spills registers or keeps a stack in local memory pays for it in every thread.
"""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = runpy.run_path(str(ROOT / "dan_fast/_sources.py"))


class Kernel(NamedTuple):
    """Registers a thread, shared memory in bytes a block, stack and spills in bytes a thread."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def all_sources() -> list[Path]:
    return [path for path in SOURCES["source_files"](ROOT) if path.suffix == ".cu"]


def readable(names: Iterable[str]) -> dict[str, str]:
    """Mangled names to `kernel<types>`; unchanged where binutils are not installed."""
    names = list(dict.fromkeys(names))
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    listing = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"\(anonymous namespace\)::|dan_fast::|^void ", "", line) for line in listing.splitlines())
    return {name: line.split("(")[0] for name, line in zip(names, short, strict=True)}


def resources(source: Path, archs: Iterable[str], nvcc: str, flags: Iterable[str] = ()) -> list[Kernel]:
    """Compiles one file for compute capabilities, such as "8.6", with `flags` beside the build's own.

    All are made of the PTX of the oldest, which differs from theirs in the name of its target alone.

    Raises:
        RuntimeError: it does not compile; holds the compiler's output.
    """
    by_name = {f"sm_{arch.replace('.', '')}": arch for arch in sorted(archs, key=float)}
    targets = f"-gencode=arch={next(iter(by_name)).replace('sm', 'compute')},code=[{','.join(by_name)}]"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *SOURCES["nvcc_flags"](source), *flags, targets, "-Xptxas=-v", "-fatbin"]
        done = subprocess.run([*command, source, "-o", f"{folder}/kernels"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    kernels = []
    for block in done.stderr.split("Compiling entry function '")[1:]:

        def number_of(pattern: str, text: str = block) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        registers, shared = number_of(r"Used (\d+) registers"), number_of(r"(\d+) bytes smem")
        stack, spilled = number_of(r"(\d+) bytes stack frame"), number_of(r"(\d+) bytes spill stores")
        name, _, target = block.split("'")[:3]
        kernels.append(Kernel(name, by_name[target], registers, shared, stack, spilled))
    names = readable(kernel.name for kernel in kernels)
    return [kernel._replace(name=names[kernel.name]) for kernel in kernels]


def table(kernels: Iterable[Kernel]) -> str:
    titles = ("kernel", "arch", "registers", "shared", "stack", "spilled")
    rows = [titles, *(tuple(map(str, kernel)) for kernel in kernels)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["8.6", "9.0"], help="compute capabilities")
    parser.add_argument("sources", nargs="*", type=Path, help="default: all of the extension")
    chosen = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found: install the CUDA toolkit and put nvcc on PATH", file=sys.stderr)
        return 1
    jobs = [(source, chosen.arch, nvcc) for source in chosen.sources or all_sources()]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [kernel for kernels in pool.map(lambda job: resources(*job), jobs) for kernel in kernels]
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
