"""What `dan-fast doctor` says of this machine, of a broken extension and of one that is missing."""

import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch

import dan_fast
from dan_fast import __version__, _extension, cli
from dan_fast.commands import doctor
from dan_fast.evaluation import counting
from tests.support import in_checkout
from tests.support.toolchain import needs_extension

pytestmark = pytest.mark.usefixtures("forget")


def printed() -> tuple[str, int]:
    """What it says on a wide terminal, and its exit code."""
    with patch.dict(os.environ, COLUMNS="1000"), redirect_stdout(io.StringIO()) as said:
        code = doctor.print_report()
    return said.getvalue(), code


def test_the_report_names_versions_paths_and_parts():
    found = doctor.report()
    versions = dict(found.versions)
    assert versions["dan_fast"] == __version__ and versions["torch"] == torch.__version__
    assert {"Python", "torchvision", "triton", "compiler of the build", "nvcc of the build"} <= versions.keys()
    operators = " ".join(operator for operator, _, _ in found.paths)
    for name in ("row_sq_norms", "memory_step: passes", "memory_step: scan", "cosine_softmax, false_sample_sets",
                 "attention_head", "nl_cbam, attention_adversary"):  # fmt: skip
        assert operators.count(name) == len({device for _, device, _ in found.paths})
    assert operators.count("ranking") == 1  # by C++ on a CPU alone
    text, _ = printed()
    for cell in (torch.__version__, "memory_step", "CPU kernels", "CUDA kernels"):
        assert cell in text


@needs_extension
def test_with_the_extension_the_kernel_serves_and_nothing_is_broken():
    found = doctor.report()
    assert found.broken == [], "is the extension older than csrc?"
    assert found.exit_code == 0
    assert ("row_sq_norms", "cpu", "C++ kernel") in found.paths
    assert found.paths[-1] == ("ranking by distances or features", "cpu", "C++ kernel")
    assert dict(found.built)["CPU kernels"].startswith(f"yes, for {torch.ops.dan_fast.instruction_set()} of ")
    built_with_cuda = "CUDA" in _extension.build_info()["built"]
    assert dict(found.built)["CUDA kernels"].startswith("yes, for" if built_with_cuda else "no")


def test_the_commands_that_keep_freed_blocks_are_named(monkeypatch: pytest.MonkeyPatch):
    kept = []
    monkeypatch.setattr(cli, "_keep_heap_on_a_cpu", lambda device: kept.append(command))
    monkeypatch.setattr(cli, "resolve_name", MagicMock(side_effect=InterruptedError))
    monkeypatch.setattr(doctor, "why_heap_is_left", lambda: None)
    for command in cli._COMMANDS:
        with pytest.raises(InterruptedError):
            cli._run(MagicMock(), MagicMock(command=command))
    said = dict(doctor.report().built)["heap on a CPU"].removeprefix("freed blocks are kept by ")
    assert sorted(said.replace(" and ", ", ").split(", ")) == sorted(kept)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("no compiled extension: no C++ compiler was found; install g++", "no C++ compiler was found; install g++"),
        # A library that was built and is gone is not explained by missing CUDA.
        ("no CUDA kernels: nvcc was not found; install it", "the compiled extension was not built; reinstall"),
        (None, "was not built; reinstall dan_fast (from a checkout: pip install -e .)"),
    ],
)
def test_without_the_extension_it_says_why_and_all_is_well(monkeypatch, tmp_path: Path, missing: str | None, said: str):
    info = tmp_path / "info.json"
    if missing is not None:
        info.write_text(json.dumps({"missing": [missing]}))
    monkeypatch.setattr(_extension, "LIBRARY", tmp_path / "absent.so")
    monkeypatch.setattr(_extension, "BUILD_INFO", info)
    text, code = printed()
    assert code == 0 and text.count(said) == 1
    assert ("row_sq_norms", "cpu", "PyTorch") in doctor.report().paths


def test_a_library_that_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "[odd]:snake:_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "LIBRARY", broken)
    text, code = printed()
    assert code == 1
    assert f"broken: {broken} does not load with torch" in text


@pytest.mark.parametrize("there", [True, False])
def test_a_ranking_that_does_not_load_is_broken_and_one_not_there_is_missing(monkeypatch, tmp_path, there):
    module = tmp_path / counting.MODULE.name
    if there:
        module.write_bytes(b"not a library")
    monkeypatch.setattr(counting, "MODULE", module)
    monkeypatch.setattr(counting, "load", counting.load.__wrapped__)
    monkeypatch.delattr(dan_fast, "_ranking", raising=False)
    monkeypatch.setitem(sys.modules, "dan_fast._ranking", None)
    monkeypatch.setattr(_extension, "BUILD_INFO", tmp_path / "absent.json")
    text, code = printed()
    assert code == int(there)
    said = f"broken: {module} does not load" if there else "missing: the compiled ranking was not built for Python 3."
    assert said in text


@pytest.mark.parametrize("native", [True, False])
def test_a_binary_older_than_its_sources_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: bool):
    """The operators, and the ranking of this Python; that of another one is none of its business."""
    now = doctor.source_hash(in_checkout("csrc").parent)
    rankings = {counting.MODULE.name: now if native else "other", "_ranking.of-another.so": "other"}
    info = tmp_path / "info.json"
    content = {"built": ["CPU"], "missing": [], "cuda_archs": [], "source_hash": "other" if native else now}
    info.write_text(json.dumps(content | {"rankings": rankings}))
    assert not doctor.stale({"source_hash": now, "rankings": rankings | {counting.MODULE.name: now}})
    monkeypatch.setattr(_extension, "BUILD_INFO", info)
    found = doctor.report()
    assert found.exit_code == 1
    assert [
        s for s in found.broken if "changed since the extension was built; reinstall dan_fast (from a checkout" in s
    ]


def test_the_source_hash_sees_every_change(tmp_path: Path):
    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return doctor.source_hash(tmp_path)

    hashes = [
        write("csrc/memory/a.h", "1"),
        write("csrc/memory/a.h", "2"),
        write("python_bindings/b.cpp", "2"),
        write("csrc/memory/c.cu", ""),
    ]
    assert len(set(hashes)) == 4
    assert write("elsewhere/d.cu", "1") == hashes[-1]


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, major: int, minor: int) -> None:
    properties = SimpleNamespace(name=name, major=major, minor=minor, total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_a_gpu_that_the_kernels_do_not_cover_is_named(monkeypatch: pytest.MonkeyPatch):
    reason = "the CUDA kernels, built for 8.6, do not run on Old GPU (no kernel image)"
    pretend_gpu(monkeypatch, "Old GPU", 6, 1)
    monkeypatch.setattr(_extension, "why_not_on", lambda kind, index=None: reason if kind == "cuda" else None)
    found = doctor.report()
    assert found.gpus == [("0", "Old GPU", "6.1", "8.0 GiB", "do not run")]
    assert ("row_sq_norms", "cuda", "PyTorch") in found.paths and found.advice.count(reason) == 1
    assert not any("no GPU" in sentence for sentence in found.advice)


def test_a_gpu_without_triton_takes_pytorch_for_the_passes(monkeypatch: pytest.MonkeyPatch):
    reason = "Triton is not installed; run `pip install triton` (it exists for Linux only)"
    pretend_gpu(monkeypatch, "GPU", 8, 6)
    monkeypatch.setattr(_extension, "why_not_on", lambda kind, index=None: None)
    monkeypatch.setattr(doctor.triton_kernels, "why_not", lambda index=None: reason)
    found = doctor.report()
    assert ("memory_step: passes over the memories", "cuda", "PyTorch") in found.paths
    assert ("memory_step: scan", "cuda", "CUDA kernel") in found.paths and reason in found.advice
