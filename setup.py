"""Builds two libraries from csrc/ and python_bindings/; all that is static stands in pyproject.toml.

`dan_fast/_native.so`, the operators, uses PyTorch's stable ABI only and is not a Python module: one file serves
every torch >= 2.11 and every Python, so the torch whose headers it was built with need not be the one it runs with.
`dan_fast/_ranking*.so`, the ranking over NumPy arrays, is a module for the Python that builds it and knows no torch
(pybind11's headers come with torch). What cannot be built is left out and the reason is kept in
`dan_fast/_build_info.json`, which `dan-fast doctor` shows.
"""

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which the backend of a PEP 517 build leaves out
from setup_toolchain import (
    AGAIN,
    ROOT,
    SOURCES,
    CannotBuild,
    Torch,
    build_requirements,
    cuda_archs,
    find_compiler,
    find_nvcc,
    find_torch,
    first_line,
    python_headers,
)

LIBRARY, MODULE, BUILD_INFO = "_native.so", f"_ranking{sysconfig.get_config_var('EXT_SUFFIX')}", "_build_info.json"
TORCH_TARGET_VERSION = "0x020b000000000000"
# A `*_isa.cpp` is compiled once for each of these, from the smallest instruction set to the largest; csrc/cpu/isa.h
# tells them apart.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}
# To optimise takes most of the time of an installation. Bindings check and hand over; the smallest of several
# instruction sets is for machines of before 2013.
BINDING = "-O1"
# Contraction would give a fused multiply-add to some sets only, and the scan its bits by the CPU.
ISA_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def instruction_sets(compiler: list[str]) -> dict[str, list[str]]:
    """Of INSTRUCTION_SETS those that the compiler, and the machine it compiles for, know."""
    vectors = b"typedef double V __attribute__((vector_size(64))); V sum(V a, V b) { return a + b; }\n"
    probe = [*compiler, "-x", "c++", "-O2", "-c", "-", "-o", os.devnull]
    known = {}
    for name, flags in INSTRUCTION_SETS.items():
        if flags and subprocess.run([*probe, *flags], input=vectors, capture_output=True).returncode:
            break
        known[name] = flags
    return known


def ninja_file(
    torch: Torch,
    compiler: list[str],
    nvcc: str | None,
    archs: list[str],
    sets: dict[str, list[str]],
    python: Path | None,
) -> str:
    """The build as ninja's rules: it compiles again what changed, headers included; the module where `python` is."""

    def quoted(parts: list[str]) -> str:
        return shlex.join(parts).replace("$", "$$")

    def escaped(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    # Contraction would give sums of squares other bits where a compiler fuses by default.
    cxx_flags = [
        "-ffp-contract=off",
        "-fPIC",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        "-DNDEBUG",
    ]
    cxx_flags += [f"-DDAN_FAST_HAS_{name.upper()}" for name in sets if name != "baseline"]
    torch_flags = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        "-isystem",
        str(torch.folder / "include"),
    ]
    libraries = [f"-L{torch.folder / 'lib'}", "-ltorch"]
    if nvcc:
        torch_flags += ["-DUSE_CUDA", "-DDAN_FAST_CUDA"]
        # nvcc takes one program: of "ccache g++ -isystem /opt" that is g++.
        programs = itertools.takewhile(lambda word: not word.startswith("-"), compiler)
        host = [nvcc, "-ccbin", [*programs][-1]]
        device = [*host, "-Xcompiler=-fPIC,-Wall,-Wextra"]
        link = [*host, "-shared", "-cudart=static", "-Xlinker=--no-as-needed"]
    else:
        link = [*compiler, "-shared", "-Wl,--no-as-needed"]
    lines = [
        "ninja_required_version = 1.3",
        "rule cxx",
        f"  command = {quoted([*compiler, BINDING, *cxx_flags, *torch_flags])} -MD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = {quoted(link)} $in {quoted(libraries)} -o $out",
        "rule link_module",
        f"  command = {quoted([*compiler, '-shared', '-pthread'])} $in -o $out",
    ]
    if python:
        module_flags = ["-isystem", str(torch.folder / "include"), "-isystem", str(python), "-pthread"]
        lines += [
            "rule module",
            f"  command = {quoted([*compiler, BINDING, *cxx_flags, *module_flags])} -MD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
        ]
    for name, flags in sets.items():
        level = "-O3" if flags or len(sets) == 1 else "-O2"
        command = [*compiler, level, *cxx_flags, *ISA_FLAGS, *flags, f"-DDAN_FAST_ISA={name}"]
        lines += [
            f"rule {name}",
            f"  command = {quoted(command)} -MD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
        ]
    if nvcc:
        lines += [
            "rule cuda",
            f"  command = {quoted([*device, *gencode(archs)])} $flags -MD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
        ]
    built: dict[Path, list[str]] = {}
    # Ninja takes them in this order: what takes long and is waited for by no other must not come last.
    for source in sorted(sources(with_cuda=nvcc is not None), key=lambda each: each.parent.name != "python_bindings"):
        if of_module(source) and not python:
            continue
        stem = source.relative_to(ROOT).as_posix().replace("/", "_")
        if source.name.endswith("_isa.cpp"):
            built[source] = [f"{stem}.{name}.o" for name in sets]
            lines += [f"build {stem}.{name}.o: {name} {escaped(source)}" for name in sets]
        else:
            built[source] = [f"{stem}.o"]
            rule = "cuda" if source.suffix == ".cu" else "module" if of_module(source) else "cxx"
            lines.append(f"build {stem}.o: {rule} {escaped(source)}")
            if rule == "cuda":
                lines.append(f"  flags = {quoted(list(SOURCES['nvcc_flags'](source)))}")

    def linked(target: str, rule: str, parts: list[Path]) -> str:
        # Of an inline function that several objects hold, the linker keeps the first: one that any CPU can run.
        objects = [name for source in parts for name in built[source]]
        larger = [f".{name}.o" for name in sets if name != "baseline"]
        objects.sort(key=lambda name: next((i + 1 for i, end in enumerate(larger) if name.endswith(end)), 0))
        return f"build {target}: {rule} {' '.join(objects)}"

    lines.append(linked(LIBRARY, "link", [source for source in built if not of_module(source)]))
    if python:
        shared = [source for source in built if source.parent == ROOT / "csrc/cpu"]
        lines.append(linked(MODULE, "link_module", [*shared, *filter(of_module, built)]))
    return "\n".join(lines) + "\n"


def sources(with_cuda: bool) -> list[Path]:
    suffixes = {".cpp", ".cu"} if with_cuda else {".cpp"}
    return [path for path in SOURCES["source_files"](ROOT) if path.suffix in suffixes]


def of_module(source: Path) -> bool:
    return source.parent == ROOT / "csrc/ranking" or source == ROOT / "python_bindings/ranking.cpp"


def compile_libraries(folder: Path, rules: str) -> list[Path]:
    if importlib.util.find_spec("ninja") is None:
        raise CannotBuild(f"the Python package ninja was not found; install it, then {AGAIN}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(rules)
    jobs = os.environ.get("MAX_JOBS", "")
    command = [sys.executable, "-m", "ninja", "-C", str(folder)]
    command += ["-j", jobs] if re.fullmatch("0*[1-9][0-9]*", jobs) else []
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(run.stdout, flush=True)
    if run.returncode != 0:
        errors = [line for line in run.stdout.splitlines() if re.search(r"\berror\b|fatal", line)]
        raise CannotBuild(f"the compiler failed ({' / '.join(errors[:3]) or run.stdout[-300:].strip()})")
    return [folder / name for name in (LIBRARY, MODULE) if f"build {name}:" in rules]


def build_native(package: Path, scratch: Path) -> dict:
    """Compiles as much as this machine can into `package`, by way of `scratch`, and says what it was.

    A library is put in place whole or not at all, and an older one does not stay where none can be built.
    """
    info: dict = {"built": [], "ranking": False, "instruction_sets": [], "cuda_archs": [], "missing": []}
    info["source_hash"] = SOURCES["source_hash"](ROOT)
    libraries: list[Path] = []
    python = None
    try:
        compiler = find_compiler()
        info["compiler"] = first_line(compiler)
        torch = find_torch()
        if torch is None:
            raise CannotBuild(f"no torch >= 2.11 was found to compile against; install it, then {AGAIN}")
        info["torch_headers"] = torch.version
        sets = instruction_sets(compiler)
        no_ranking = []
        try:
            python = python_headers()
        except CannotBuild as reason:
            no_ranking = [f"no compiled ranking: {reason}"]
        try:
            nvcc = find_nvcc()
            info["nvcc"] = first_line([nvcc], r"release .+")
            archs = cuda_archs(nvcc)
            rules = ninja_file(torch, compiler, nvcc, archs, sets, python)
            libraries = compile_libraries(scratch / "cuda", rules)
            info["built"], info["cuda_archs"] = ["CPU", "CUDA"], archs
        except CannotBuild as reason:
            info["missing"].append(f"no CUDA kernels: {reason}")
            libraries = compile_libraries(scratch / "cpu", ninja_file(torch, compiler, None, [], sets, python))
            info["built"] = ["CPU"]
        info["instruction_sets"] = list(sets)
        info["ranking"] = python is not None
        info["missing"] += no_ranking
    except CannotBuild as reason:
        info["missing"].append(f"no compiled extension: {reason}")
    package.mkdir(parents=True, exist_ok=True)
    # The modules of other Pythons that share the checkout stay, and what they were built from.
    info["rankings"] = {name: each for name, each in rankings_of(package).items() if (package / name).is_file()}
    info["rankings"].pop(MODULE, None)
    if info["ranking"]:
        info["rankings"][MODULE] = info["source_hash"]
    for name in {LIBRARY, MODULE} - {library.name for library in libraries}:
        (package / name).unlink(missing_ok=True)
    for library in libraries:
        # A process that has the old file mapped keeps it: the new one gets an inode of its own.
        staged = package / (library.name + ".new")
        shutil.copy2(library, staged)
        staged.replace(package / library.name)
    (package / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")
    return info


def rankings_of(package: Path) -> dict[str, str]:
    """What an earlier build says of the modules in a folder: the source hash of each."""
    try:
        return json.loads((package / BUILD_INFO).read_text()).get("rankings", {})
    except (OSError, ValueError):
        return {}


@contextmanager
def building_alone(lock_file: Path) -> Iterator[None]:
    """Two builds in one checkout write the same objects and the same libraries: the second waits for the first."""
    if sys.platform != "linux":  # where nothing is compiled, and Windows lacks fcntl
        yield
        return
    import fcntl

    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"dan_fast: waiting for another build in {ROOT}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some file systems of a network have no locks
            print(f"dan_fast: {lock_file} cannot be locked ({error.strerror})", file=sys.stderr)
        yield


class BuildPython(build_py):
    """Without what earlier builds in this folder copied: the next wheel would hold modules that are gone."""

    def run(self) -> None:
        copied = Path(self.build_lib) / "dan_fast"
        if not self.editable_mode and copied.resolve() != ROOT / "dan_fast":
            shutil.rmtree(copied, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Builds with ninja instead of setuptools' compiler; into the checkout for an editable install."""

    def run(self) -> None:
        package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        with building_alone(ROOT / "build/native.lock"):
            info = build_native(package / "dan_fast", ROOT / "build/native")
        print(f"dan_fast: built {' and '.join(info['built']) or 'no extension: PyTorch serves every operator'}")
        for sentence in info["missing"]:
            print(f"dan_fast: {sentence}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "dan_fast"
        return [str(folder / name) for name in (LIBRARY, MODULE, BUILD_INFO) if (folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """Without the module there is no Python ABI in it, so one wheel serves every Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        built = self.get_finalized_command("build_ext").get_outputs()
        return tag if any(Path(path).name == MODULE for path in built) else ("py3", "none", tag[2])


if __name__ == "__main__":
    setup(
        setup_requires=build_requirements(),
        ext_modules=[Extension("dan_fast._native", sources=[], optional=True)],
        cmdclass={"build_py": BuildPython, "build_ext": BuildNative, "bdist_wheel": Wheel},
    )
