"""The CUDA kernels' bodies on host threads under ThreadSanitizer and AddressSanitizer, and that these see a mistake."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.toolchain import build_on_host, needs_compiler, run_under_sanitizer, why_no_sanitizer

pytestmark = [pytest.mark.compile, needs_compiler]


class Program(NamedTuple):
    source: str
    races: str  # the macro under ThreadSanitizer
    bounds: str  # and under AddressSanitizer
    right: tuple[str, ...] = ()  # arguments of a run without a mistake
    racy: tuple[str, ...] | None = ("racy",)  # and of those with one
    short: tuple[str, ...] | None = ("short",)


PROGRAMS = {
    "head": Program("attention/head_on_host.cpp", "HEAD_ON_HOST_MAIN", "HEAD_ON_HOST_MAIN"),
    "maps": Program("attention/refine_on_host.cpp", "REFINE_ON_HOST_MAIN", "REFINE_ON_HOST_MAIN"),
    "scan": Program(
        "memory/scan_on_host.cpp", "SCAN_ON_HOST_MAIN=double", "SCAN_ON_HOST_MAIN=float",
        ("2", "64"), ("2", "32", "racy"), ("1", "32", "short"),
    ),
    "weights": Program("memory/weights_on_host.cpp", "WEIGHTS_ON_HOST_MAIN", "WEIGHTS_ON_HOST_MAIN", (), None, None),
}  # fmt: skip
REPORTS = {"thread": (66, "data race"), "address,undefined": (None, "heap-buffer-overflow")}
BUILT: dict[tuple[str, str], Path] = {}


def built(name: str, sanitizer: str, folder: pytest.TempPathFactory) -> Path:
    if (name, sanitizer) not in BUILT:
        if reason := why_no_sanitizer(f"-fsanitize={sanitizer}"):
            pytest.skip(reason)
        macro = PROGRAMS[name].races if sanitizer == "thread" else PROGRAMS[name].bounds
        flags = ["-O0", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-D{macro}"]
        BUILT[name, sanitizer] = build_on_host(PROGRAMS[name].source, folder.mktemp(name) / "program", *flags)
    return BUILT[name, sanitizer]


SANITIZERS = pytest.mark.parametrize("sanitizer", REPORTS)


@pytest.mark.parametrize("name", PROGRAMS)
@SANITIZERS
def test_nothing_is_reported(tmp_path_factory: pytest.TempPathFactory, sanitizer: str, name: str):
    """No data race; no access out of bounds and no undefined behaviour."""
    done = run_under_sanitizer(built(name, sanitizer, tmp_path_factory), *PROGRAMS[name].right)
    assert done.returncode == 0 and (done.stderr == "" or sanitizer == "thread"), done.stderr[:3000]


@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items() if program.racy])
@SANITIZERS
def test_a_mistake_is_reported(tmp_path_factory: pytest.TempPathFactory, sanitizer: str, name: str):
    """A barrier that orders nothing and, of the maps, blocks that share memory; an output that is too short."""
    wrong = PROGRAMS[name].racy if sanitizer == "thread" else PROGRAMS[name].short
    done = run_under_sanitizer(built(name, sanitizer, tmp_path_factory), *wrong)
    code, words = REPORTS[sanitizer]
    assert words in done.stderr and (done.returncode == code if code else done.returncode != 0)
