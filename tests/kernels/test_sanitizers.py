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
WITH_MISTAKES = [name for name, program in PROGRAMS.items() if program.racy]
BUILT: dict[tuple[str, str], Path] = {}


def built(name: str, sanitizer: str, macro: str, folder: pytest.TempPathFactory) -> Path:
    reason = why_no_sanitizer(f"-fsanitize={sanitizer}")
    if reason:
        pytest.skip(reason)
    if (name, sanitizer) not in BUILT:
        flags = ["-O0", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-D{macro}"]
        BUILT[name, sanitizer] = build_on_host(PROGRAMS[name].source, folder.mktemp(name) / "program", *flags)
    return BUILT[name, sanitizer]


def watched_for_races(name: str, folder: pytest.TempPathFactory) -> Path:
    return built(name, "thread", PROGRAMS[name].races, folder)


def watched_for_bounds(name: str, folder: pytest.TempPathFactory) -> Path:
    return built(name, "address,undefined", PROGRAMS[name].bounds, folder)


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_data_race(tmp_path_factory: pytest.TempPathFactory, name: str):
    done = run_under_sanitizer(watched_for_races(name, tmp_path_factory), *PROGRAMS[name].right)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.mark.parametrize("name", WITH_MISTAKES)
def test_a_barrier_that_orders_nothing_is_reported(tmp_path_factory: pytest.TempPathFactory, name: str):
    """And, of the maps, blocks that share memory."""
    done = run_under_sanitizer(watched_for_races(name, tmp_path_factory), *PROGRAMS[name].racy)
    assert done.returncode == 66 and "data race" in done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_access_out_of_bounds_and_no_undefined_behaviour(tmp_path_factory: pytest.TempPathFactory, name: str):
    done = run_under_sanitizer(watched_for_bounds(name, tmp_path_factory), *PROGRAMS[name].right)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", WITH_MISTAKES)
def test_an_access_out_of_bounds_is_reported(tmp_path_factory: pytest.TempPathFactory, name: str):
    done = run_under_sanitizer(watched_for_bounds(name, tmp_path_factory), *PROGRAMS[name].short)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
