"""The package: one version, imports that point downwards, and a build that copes with whatever is missing."""

import ast
import errno
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import setuptools
import yaml

import dan_fast
from tests.support import PACKAGE, ROOT, in_checkout

PATH, COMPILER = os.environ["PATH"], shutil.which("c++")
# A room imports from its own level and the levels before it.
LEVELS = [
    {"core", "_extension", "_sources"},
    {"distributed", "reference", "triton_kernels"},
    {"functional"},
    {"daml", "data", "evaluation", "nn"},
    {"training", "inference", "search", "export", "reporting", "bench", "sweep"},
    {"cli", "commands", "__main__"},
]

ROOMS = ("dan_fast", "csrc", "python_bindings", "tests")
CODE = {".py", ".cpp", ".cu", ".h", ".cuh"}


def code_files() -> list[Path]:
    return [path for room in ROOMS for path in sorted(in_checkout(room).rglob("*")) if path.suffix in CODE]


def test_no_folder_has_more_than_40_files():
    count = Counter(str(path.parent.relative_to(ROOT)) for path in code_files())
    assert {folder for folder, files in count.items() if files > 40} == set(), "divide it into rooms"


def test_no_file_has_more_than_400_lines():
    code = [path for path in code_files() if not path.is_relative_to(ROOT / "tests")]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    longer = {path.name for path in (*code, *pages) if len(path.read_text().splitlines()) > 400}
    assert longer == set(), "what stands apart in it becomes a file of its own"


@pytest.mark.slow
def test_every_docstring_begins_with_a_sentence():
    without = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                summary = (ast.get_docstring(node) or "None.").split("\n\n")[0].rstrip()
                if not summary.endswith(".") or re.match(r"\w+:\n", summary):
                    without.add(getattr(node, "name", path.name))
    assert without == set()


def rooms_imported(path: Path) -> set[str]:
    """The first part of each `dan_fast.X` that a file imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "dan_fast":
            names = [f"dan_fast.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [node.module or ""]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("dan_fast.")}
    return {room for room in rooms if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()}


def test_files_are_written_whole():
    """By `dan_fast.core.files`; exceptions are folders that are whole or removed, logs, locks, /proc and memory."""
    writes = re.compile(r"""open\([^)]*["'][wax]b?\+?["']|\.write_(text|bytes)\(|\.save\(|\.savez?\(|savefig\(""")
    found = {
        (str(path.relative_to(PACKAGE)), line.strip())
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if writes.search(line) and not line.strip().startswith((">>>", "..."))
    }
    assert found == {
        ("bench/search.py", 'with file.open("wb") as stream:'),
        (
            "reporting/search_page.py",
            'lambda stream, picture=picture: Image.fromarray(picture).save(stream, "JPEG", quality=90),',
        ),
        ("bench/machine.py", 'Path("/proc/self/clear_refs").write_text("5")'),
        ("data/images/cache_header.py", "write_whole(path, lambda stream: np.savez(stream, **content))"),
        ("data/datasets/extraction.py", "image.save(path, **options)"),
        ("data/synthetic/writer.py", "image.save(folder / path, quality=domain.jpeg_quality)"),
        ("data/synthetic/writer.py", 'with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:'),
        ("core/files.py", 'with unfinished.open("xb") as stream:'),
        ("inference/feature_file.py", "write_whole(name, lambda stream, content=content: np.save(stream, content))"),
        ("inference/feature_file.py", 'with archive.open("features.npy", "w", force_zip64=True) as file:'),
        ("inference/feature_file.py", 'with archive.open(f"{name}.npy", "w", force_zip64=True) as file:'),
        (
            "reporting/canvas.py",
            'write_whole(path, lambda stream: figure.savefig(stream, format="png", dpi=dpi, facecolor="white"))',
        ),
        ("export/formats.py", "torch.export.save(program, stream, extra_files={METADATA: json.dumps(metadata)})"),
        ("sweep/runner.py", 'with (run.folder / _LOG).open("ab") as log:'),
        ("sweep/runner.py", 'lock = (out / ".sweep.lock").open("w")'),
        ("training/checkpoint.py", 'write_whole(path, lambda stream: torch.save({"format": FORMAT, **state}, stream))'),
        ("training/run_folder.py", "self._writer.save(self.checkpoint, state)"),
    }


def test_imports_point_downwards():
    level = {room: index for index, rooms in enumerate(LEVELS) for room in rooms}
    upwards = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in level, f"{room} has no level in LEVELS"
        upwards += [
            f"{path.relative_to(PACKAGE)} imports {other}"
            for other in rooms_imported(path)
            if level[other] > level[room] or (room == "reference" and other not in ("core", "reference"))
        ]
    assert upwards == []


def test_the_meta_step_knows_no_file_of_images():
    """By what its module imports and those import in their turn: MetaStep serves loops that have their own data."""
    seen, todo = set(), [PACKAGE / "training/step.py"]
    while todo:
        path = todo.pop()
        seen.add(path)
        for node in ast.parse(path.read_text()).body:
            from_it = [node.module] if isinstance(node, ast.ImportFrom) else []
            whole = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            for name in (each for each in (*from_it, *whole) if each.startswith("dan_fast.")):
                named = PACKAGE.parent / name.replace(".", "/")
                module = named / "__init__.py" if named.is_dir() else named.with_suffix(".py")
                todo += {module} - seen
    rooms = {path.relative_to(PACKAGE).parts[0] for path in seen}
    assert "nn" in rooms and rooms.isdisjoint({"data", "evaluation"})


def imported_by(code: str) -> list[str]:
    """The modules that an interpreter of its own has imported when `code` has run."""
    code += "\nimport sys\nsys.stdout.write('MODULES ' + ' '.join(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return ran.stdout.rpartition("MODULES ")[2].split()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["frobnicate"]], ids=" ".join)
def test_the_list_of_commands_waits_for_no_command(arguments: list[str]):
    """No second of CPU time for `dan-fast --help`: PyTorch alone takes one and a half."""
    run = f"from dan_fast.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass"
    modules = imported_by(run)
    of_commands = {"torch", "torchvision", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "rich", "tensorboard"}
    assert of_commands.isdisjoint(modules)
    assert {name for name in modules if name.startswith("dan_fast.")} == {
        "dan_fast.cli",
        "dan_fast.core",
        "dan_fast.core.errors",
        "dan_fast.core.home",
        "dan_fast.core.launched",
        "dan_fast.core.yaml_files",
    }
    assert len(modules) < 600  # of PyTorch 1200; jsonargparse and the standard library make 300 of it


@pytest.mark.slow
def test_the_package_costs_no_more_than_pytorch_and_its_names_are_there_when_they_are_asked_for():
    code = """
import sys
import tomllib
import dan_fast
assert [name for name in sys.modules if name.split(".")[0] in ("dan_fast", "torch")] == ["dan_fast"]
import torch
pytorch = len(sys.modules)
from dan_fast import MemoryState
assert "dan_fast.reference" in sys.modules and len(sys.modules) <= 1.05 * pytorch
assert {"MemoryState", "NLCBAMWeights", "reference", "__version__"} <= set(dir(dan_fast))
try:
    dan_fast.MemoryStat
except AttributeError as error:
    assert "'dan_fast' has no attribute 'MemoryStat'" in str(error)
else:
    raise AssertionError("a name that is not there")
assert MemoryState is dan_fast.MemoryState is dan_fast.reference.MemoryState
from dan_fast import *
assert NLCBAMWeights is dan_fast.core.types.NLCBAMWeights
"""
    assert "torch" in imported_by(code)


@pytest.mark.slow
def test_an_import_leaves_the_heap_and_asks_for_no_package_that_may_be_missing():
    code = """
import sys
sys.modules["triton"] = None
import dan_fast.core.heap
dan_fast.core.heap.ctypes = None
import dan_fast.nn
assert "huggingface_hub" not in sys.modules and "dan_fast.evaluation" not in sys.modules
import dan_fast.training, dan_fast.triton_kernels
assert "does not load" in dan_fast.triton_kernels.why_not() or "not installed" in dan_fast.triton_kernels.why_not()
"""
    assert "dan_fast.functional" in imported_by(code)


def test_the_errors_of_the_package_come_without_pytorch():
    modules = imported_by("from dan_fast import DanFastError, Interrupted")
    assert "dan_fast.core.errors" in modules and "torch" not in modules


def test_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", dan_fast.__version__)
    assert importlib.metadata.version("dan-fast") == dan_fast.__version__
    assert f"\nversion: {dan_fast.__version__}\n" in in_checkout("CITATION.cff").read_text()


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["dan-fast", "doctor"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("dan_fast", run_name="__main__")
    assert left.value.code == 0
    assert "memory_step" in capsys.readouterr().out


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dan_fast_setup", in_checkout("setup.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toolchain(build: ModuleType) -> ModuleType:
    """What `build` has imported."""
    return sys.modules["setup_toolchain"]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A PATH that holds what a test puts there: name -> body of a script."""
    folder, which = tmp_path / "tools", shutil.which
    folder.mkdir()
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    # What is given by an absolute path outside the test's folders, /usr/local/cuda, is not there either.
    monkeypatch.setattr(shutil, "which", lambda name: which(name) if (folder / name).is_relative_to(tmp_path) else None)

    def put(**scripts: str) -> Path:
        for name, body in scripts.items():
            program = folder / name
            program.write_text(f"#!/bin/sh\n{body}\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return folder

    return put


def test_a_backend_that_leaves_the_checkout_out_of_the_path_can_run_the_build():
    code = f"import runpy; runpy.run_path({str(in_checkout('setup.py'))!r})"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_the_compiler(build: ModuleType, tools, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(build.CannotBuild, match="no C\\+\\+ compiler was found; install g\\+\\+"):
        build.find_compiler()
    assert build.build_requirements() == [], "without a compiler there is no use for torch's headers"
    tools(**{"clang++": "exit 0"})
    assert build.find_compiler() == ["clang++"]
    tools(**{"g++": "exit 0", "ccache": "exit 0"})
    assert build.find_compiler() == ["g++"]
    monkeypatch.setenv("CXX", "ccache clang++ -m64")
    assert build.find_compiler() == ["ccache", "clang++", "-m64"]
    monkeypatch.setenv("CXX", "nosuch")
    with pytest.raises(build.CannotBuild, match="CXX names nosuch, which was not found"):
        build.find_compiler()
    monkeypatch.setenv("CXX", '"')
    with pytest.raises(build.CannotBuild, match=r"CXX is no command \(No closing quotation\); correct or unset it"):
        build.find_compiler()


def test_nvcc(build: ModuleType, tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(build.CannotBuild, match="nvcc was not found; .*install the CUDA toolkit"):
        build.find_nvcc()
    on_path = str(tools(nvcc="exit 0") / "nvcc")
    assert build.find_nvcc() == on_path
    home = tmp_path / "cuda"
    shutil.copytree(tmp_path / "tools", home / "bin")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build.find_nvcc() == str(home / "bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    assert build.find_nvcc() == on_path, "a CUDA_HOME that is not there is no error"


def test_torch_is_asked_for_only_where_there_is_none(
    build: ModuleType, toolchain: ModuleType, tools, monkeypatch: pytest.MonkeyPatch
):
    tools(**{"c++": "exit 0"})
    assert build.find_torch() is not None and build.build_requirements() == []
    monkeypatch.setattr(toolchain, "OLDEST_TORCH", (99, 0))
    assert build.find_torch() is None and build.build_requirements() == ["torch>=99.0"]


def test_the_cuda_architectures(build: ModuleType, tools, monkeypatch: pytest.MonkeyPatch):
    nvcc = str(tools(nvcc="echo sm_75; echo sm_80; echo sm_86") / "nvcc")
    assert build.cuda_archs(nvcc) == ["8.0+PTX"], "no driver"
    for answer, archs in {
        "8.6\n8.0\n8.6": ["8.0", "8.6"],
        "8.6\n12.0": ["8.0+PTX"],  # which this nvcc does not know
        "7.5": ["8.0+PTX"],  # for which the kernels are not written
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.": ["8.0+PTX"],
        'Field "compute_cap" is not a valid field to query.': ["8.0+PTX"],
    }.items():
        tools(**{"nvidia-smi": f"printf '%s\\n' '{answer.replace(chr(39), '')}'"})
        assert build.cuda_archs(nvcc) == archs, answer
    for wanted, archs in {
        "8.6": ["8.6"],
        "7.5;8.0 9.0a,12.0+PTX": ["7.5", "8.0", "9.0a", "12.0+PTX"],
        "Ampere;9.0": ["8.0", "8.6+PTX", "9.0"],
    }.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        assert build.cuda_archs(nvcc) == archs
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;sm_90")
    with pytest.raises(build.CannotBuild, match="TORCH_CUDA_ARCH_LIST holds 'sm_90'"):
        build.cuda_archs(nvcc)
    flags = build.gencode(["8.6", "9.0+PTX"])
    assert flags == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_no_compiler_leaves_no_library_and_the_reason(build: ModuleType, tools, tmp_path: Path):
    package = tmp_path / "package"
    package.mkdir()
    others = {"_ranking.of-another-python.so": "its sources"}
    for name in (build.LIBRARY, build.MODULE, *others):
        (package / name).write_bytes(b"of an earlier build")
    earlier = {"rankings": others | {build.MODULE: "older ones", "_ranking.gone.so": "x"}}
    (package / build.BUILD_INFO).write_text(json.dumps(earlier))
    info = build.build_native(package, tmp_path / "scratch")
    assert info["built"] == [] and not info["ranking"] and info["rankings"] == others
    assert {path.name for path in package.iterdir()} == {"_build_info.json", *others}
    assert json.loads((package / "_build_info.json").read_text()) == info
    (sentence,) = info["missing"]
    assert sentence.startswith("no compiled extension: no C++ compiler was found")


def test_a_program_that_cannot_be_executed_is_as_one_that_is_not_there(build: ModuleType, tools, tmp_path: Path):
    folder = tools(**{"nvcc": "exit 0", "nvidia-smi": "exit 0", "c++": "exit 1"})
    for name in ("nvcc", "nvidia-smi"):
        (folder / name).write_bytes(b"\x7fELF of another processor")
    assert build.cuda_archs(str(tools(nvcc="echo sm_90") / "nvcc")) == ["8.0+PTX"], "nvidia-smi"
    (folder / "nvcc").write_bytes(b"\x7fELF of another processor")
    no_cuda, no_cpu = build.build_native(tmp_path / "package", tmp_path / "scratch")["missing"]
    assert no_cuda.startswith(
        f"no CUDA kernels: {folder}/nvcc cannot be executed (Exec format error); repair or remove"
    )
    assert no_cpu.startswith("no compiled extension: the compiler failed"), "which was tried for the CPU part"
    (folder / "c++").write_bytes(b"\x7fELF of another processor")
    (sentence,) = build.build_native(tmp_path / "package", tmp_path / "scratch")["missing"]
    assert sentence.startswith("no compiled extension: c++ cannot be executed (Exec format error); repair or remove")


@pytest.mark.compile
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler on this machine")
def test_a_cuda_toolkit_that_fails_leaves_the_cpu_part(build: ModuleType, tools, tmp_path: Path):
    # All operators, optimised and for all instruction sets, take a minute, and installing compiles them: here one, with
    # files without content in place of the others, by a compiler that knows no AVX.
    others = "|".join(f'*"{ROOT}"/{each}*' for each in ("csrc/memory/", "csrc/attention/", "python_bindings/[am]"))
    compiler = f"""case "$*" in *avx*) exit 1;; esac
PATH="{PATH}"
eval "last=\\${{$#}}"
case "$*" in {others}) exec "{COMPILER}" -fPIC -MD -MF "$last.d" -x c++ -c /dev/null -o "$last";; esac
exec "{COMPILER}" "$@" -O0"""
    tools(**{"c++": compiler, "nvcc": "echo 'fatal error: cuda_runtime.h: No such file or directory'; exit 1"})
    info = build.build_native(tmp_path / "package", tmp_path / "scratch")
    assert info["built"] == ["CPU"] and info["cuda_archs"] == [] and info["ranking"]
    assert info["instruction_sets"] == ["baseline"]
    (sentence,) = info["missing"]
    assert sentence.startswith("no CUDA kernels: the compiler failed") and "cuda_runtime.h" in sentence
    check = f"""
import torch
torch.ops.load_library({str(tmp_path / "package/_native.so")!r})
assert torch.ops.dan_fast.row_sq_norms(torch.ones(2, 3)).tolist() == [3, 3]
assert not torch._C._dispatch_has_kernel_for_dispatch_key("dan_fast::row_sq_norms", "CUDA")
"""
    subprocess.run([sys.executable, "-c", check], check=True)
    spec = importlib.util.spec_from_file_location("_ranking", tmp_path / "package" / build.MODULE)
    ranking = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranking)
    assert ranking.square_norms(np.ones((2, 3)), "float64", 1).tolist() == [3, 3]


def test_without_pythons_headers_the_operators_are_built(build: ModuleType, tools, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda kind: str(tmp_path))
    with pytest.raises(build.CannotBuild, match="has no Python.h; install Python's headers"):
        build.python_headers()
    rules = build.ninja_file(build.find_torch(), ["c++"], None, [], {"baseline": []}, None)
    assert f"build {build.LIBRARY}: link " in rules and build.MODULE not in rules and "rank" not in rules


def test_only_the_memory_is_compiled_without_contraction(build: ModuleType):
    """Its slots need the same bits as on a CPU; the head's products are faster with fused multiply-adds."""
    rules = build.ninja_file(build.find_torch(), ["c++"], "nvcc", ["9.0"], {"baseline": []}, None)
    flags = dict(re.findall(r"^build (\S+)\.cu\.o: cuda .*\n  flags = (.*)$", rules, re.MULTILINE))
    exact = {name for name, given in flags.items() if "-fmad=false" in given}
    assert exact == {name for name in flags if name.startswith("csrc_memory_")}
    assert {"csrc_memory_scan_scan_cuda_float", "csrc_attention_instantiations_head_float"} < set(flags)
    assert all("-O3" in given for given in flags.values())


def test_pages_and_what_an_editor_leaves_are_no_sources(build: ModuleType, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    folder = tmp_path / "csrc/memory"
    (folder / ".history").mkdir(parents=True)
    (folder / "a.cpp").write_text("int a;")
    (folder / "a.cu").write_text("int b;")
    before = build.SOURCES["source_hash"](tmp_path)
    assert build.sources(with_cuda=True) == [folder / "a.cpp", folder / "a.cu"]
    (folder / ".#a.cpp").symlink_to("someone@machine.4711")  # a lock of Emacs
    for name in (".a.cpp.swp", ".hidden.cu", ".history/a.cpp", "a.cpp~", "#a.cu#", "README.md"):
        (folder / name).write_text("unfinished")
    (folder / "of.parts").mkdir()
    assert build.sources(with_cuda=True) == [folder / "a.cpp", folder / "a.cu"]
    assert build.sources(with_cuda=False) == [folder / "a.cpp"]
    assert build.SOURCES["source_hash"](tmp_path) == before


def test_max_jobs_limits_the_files_compiled_at_a_time(build: ModuleType, tmp_path: Path, monkeypatch):
    commands = []

    def ran(command: list[str], **given: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(build.subprocess, "run", ran)
    for jobs in ("3", "0", "-1", "many", ""):
        monkeypatch.setenv("MAX_JOBS", jobs)
        build.compile_libraries(tmp_path, "")
    assert commands[0][-2:] == ["-j", "3"] and not any("-j" in command for command in commands[1:])


@pytest.mark.parametrize(
    "compiler", ["g++", "ccache g++ -m64", "g++ -isystem /opt/x", "ccache g++ -I include -m64 -include all.h"]
)
def test_nvcc_is_told_the_program_among_the_words_of_the_compiler(build: ModuleType, compiler: str):
    rules = build.ninja_file(build.find_torch(), compiler.split(), "nvcc", ["9.0"], {"baseline": []}, None)
    assert set(re.findall(r"-ccbin (\S+)", rules)) == {"g++"}
    assert f"command = {compiler} -O3" in rules


def test_what_kernels_run_in_is_optimised_most(build: ModuleType):
    for sets, levels in (({"baseline": []}, ["-O3"]), (build.INSTRUCTION_SETS, ["-O2", "-O3", "-O3"])):
        rules = build.ninja_file(build.find_torch(), ["c++"], None, [], sets, None)
        assert re.findall(r"command = c\+\+ (-O.) .*-DDAN_FAST_ISA=", rules) == levels


def test_a_wheel_holds_no_module_that_is_gone(build: ModuleType, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package, built = tmp_path / "dan_fast", tmp_path / "build/lib/dan_fast"
    package.mkdir()
    for name in ("__init__.py", "new.py"):
        (package / name).touch()
    built.mkdir(parents=True)
    (built / "gone.py").touch()
    distribution = setuptools.Distribution({"packages": ["dan_fast"], "cmdclass": {"build_py": build.BuildPython}})
    distribution.script_name = "setup.py"
    distribution.run_command("build_py")
    assert sorted(path.name for path in built.iterdir()) == ["__init__.py", "new.py"]
    # --build-lib may name the checkout itself, whose sources are no copies.
    monkeypatch.setattr(build, "ROOT", tmp_path)
    distribution = setuptools.Distribution({"packages": ["dan_fast"], "cmdclass": {"build_py": build.BuildPython}})
    distribution.script_name = "setup.py"
    distribution.get_command_obj("build_py").build_lib = "."
    distribution.run_command("build_py")
    assert sorted(path.name for path in package.iterdir()) == ["__init__.py", "new.py"]


def test_tools_named_by_a_path_of_this_folder_serve_ninja_in_another(toolchain: ModuleType, tools, monkeypatch):
    folder = tools(cxx="", nvcc="").parent
    (folder / "bin").mkdir()
    (folder / "tools/nvcc").rename(folder / "bin/nvcc")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: name if Path(name).is_file() else None)
    monkeypatch.setenv("CXX", "tools/cxx -m64")
    monkeypatch.setenv("CUDA_HOME", ".")
    assert toolchain.find_compiler() == [str(folder / "tools/cxx"), "-m64"]
    assert toolchain.find_nvcc() == str(folder / "bin/nvcc")


def test_what_a_compiler_prints_need_not_be_utf8(build: ModuleType, tools, tmp_path: Path, monkeypatch):
    folder = tools(cxx=r"printf '\377' >&2")
    assert list(build.instruction_sets([str(folder / "cxx")])) == list(build.INSTRUCTION_SETS)
    ran = build.subprocess.run
    monkeypatch.setattr(
        build.subprocess,
        "run",
        lambda command, **given: ran(["/bin/sh", "-c", r"printf 'error \377'; exit 1"], **given),
    )
    with pytest.raises(build.CannotBuild, match="the compiler failed .error \ufffd"):
        build.compile_libraries(tmp_path / "scratch", "")


def test_the_wheel_is_for_this_python_where_it_holds_the_module(build: ModuleType, tmp_path: Path):
    distribution = setuptools.Distribution(
        {"ext_modules": [setuptools.Extension("dan_fast._native", [])], "cmdclass": {"build_ext": build.BuildNative}}
    )
    distribution.get_command_obj("build_ext").build_lib = str(tmp_path)
    wheel = build.Wheel(distribution)
    wheel.ensure_finalized()
    assert wheel.get_tag()[:2] == ("py3", "none")
    (tmp_path / "dan_fast").mkdir()
    (tmp_path / "dan_fast" / build.MODULE).touch()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.get_tag()[:2] == (python, python)


def test_a_second_build_in_a_checkout_waits_for_the_first(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    began, go_on, events = threading.Event(), threading.Event(), []

    def build_native(package: Path, scratch: Path) -> dict:
        events.append("begins")
        began.set()
        assert go_on.wait(120)
        events.append("ends")
        return {"built": ["CPU"], "missing": []}

    def install() -> None:
        command = build.BuildNative(setuptools.Distribution())
        command.editable_mode = True
        command.run()

    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "build_native", build_native)
    first, second = (threading.Thread(target=install) for _ in range(2))
    first.start()
    assert began.wait(120)
    second.start()
    waits = f"dan_fast: waiting for another build in {tmp_path}\n"
    said = ""
    deadline = time.monotonic() + 120
    while waits not in said and time.monotonic() < deadline:
        said += capfd.readouterr().err
        time.sleep(0.01)
    assert said == waits and events == ["begins"]
    go_on.set()
    first.join(120)
    second.join(120)
    assert events == ["begins", "ends", "begins", "ends"]


def test_without_locks_of_the_file_system_the_build_goes_on(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", MagicMock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with build.building_alone(tmp_path / "build/lock"):
        pass
    assert "lock cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_compiler_that_fails_leaves_no_library_and_its_error(build: ModuleType, tools, tmp_path: Path):
    tools(**{"c++": "echo 'torch_ops.cpp:1: error: unknown dialect'; exit 1"})
    info = build.build_native(tmp_path / "package", tmp_path / "scratch")
    assert info["built"] == [] and not (tmp_path / "package/_native.so").exists()
    no_nvcc, failed = info["missing"]
    assert no_nvcc.startswith("no CUDA kernels: nvcc was not found")
    assert "error: unknown dialect" in failed


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which setuptools says what it would pack; nothing is built."""
    folder, setup = tmp_path_factory.mktemp("described"), in_checkout("setup.py")
    subprocess.run([sys.executable, setup, "-q", "egg_info", "--egg-base", folder], cwd=ROOT, check=True)
    return folder / "dan_fast.egg-info"


def test_the_source_distribution_holds_all_that_a_build_and_the_tests_need(described: Path):
    # Whatever ends its name there: a module that another process compiles at this moment has one that is about to go.
    made = ("__pycache__/*", "*.so", "*.so.new", "_build_info.json")
    files = {path for room in (*ROOMS, "docs", "scripts") for path in (ROOT / room).rglob("*") if path.is_file()}
    files = {path.relative_to(ROOT) for path in files if not any(map(path.match, made))}
    packed = set(map(Path, (described / "SOURCES.txt").read_text().splitlines()))
    alone = {
        "setup.py",
        "setup_toolchain.py",
        "pyproject.toml",
        "LICENSE",
        "CITATION.cff",
        ".github/workflows/wheels.yml",
    }
    assert packed >= files | set(map(Path, alone))
    assert not any(path.match(name) for path in packed for name in made)


def test_the_metadata_of_a_wheel(described: Path, build: ModuleType, toolchain: ModuleType):
    told = importlib.metadata.Distribution.at(described)
    wanted = set(told.requires)
    major, minor = toolchain.OLDEST_TORCH
    assert f"torch>={major}.{minor}" in wanted and int(build.TORCH_TARGET_VERSION, 16) >> 48 == major << 8 | minor
    assert (told.metadata["Name"], told.version) == ("dan-fast", dan_fast.__version__)
    assert (told.metadata["License-Expression"], told.metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    extras = set(told.metadata.get_all("Provides-Extra"))
    assert extras >= {"cuhk03", "export", "hub", "parquet", "test", "timm"}
    without = {text.split(";")[0].strip() for text in wanted if "extra ==" not in text}
    assert without >= {"numpy", "safetensors"} and without.isdisjoint({"pytest", "onnx", "timm>=1.0"})
    assert {entry.value for entry in told.entry_points} == {"dan_fast.cli:main"}


def test_the_workflow_repairs_and_checks_by_the_scripts(toolchain: ModuleType):
    text = in_checkout(".github/workflows/wheels.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    (check,) = (step["run"].split()[0] for step in jobs["check"]["steps"] if "run" in step)
    repair = re.search(r"{project}/(\S+) {wheel} {dest_dir}$", settings["repair-wheel-command"])[1]
    assert (check, repair) == ("scripts/check_wheel.sh", "scripts/repair_wheel.sh")
    assert all(os.access(ROOT / script, os.X_OK) for script in (check, repair))
    assert f'{repair} "$wheel" dist' in (ROOT / "scripts/build_wheels.sh").read_text()
    tried = jobs["check"]["strategy"]["matrix"]
    assert tried["torch"] == ["torch=={}.{}.*".format(*toolchain.OLDEST_TORCH), "torch"]
    built = re.search(r"cp3{([\d,]+)}-manylinux_x86_64", settings["build"])[1].split(",")
    assert tried["python"] == [f"3.{built[0]}", f"3.{built[-1]}"] and built[0] == "11"
    assert "secrets" not in text and jobs["publish"]["permissions"] == {"id-token": "write"}
