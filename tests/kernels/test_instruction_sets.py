"""The CPU kernels with each instruction set that this CPU would not choose: right, and the same bits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dan_fast import _extension
from dan_fast.data.images.augment import augment, draw, normalize
from tests.support import ROOT, head_problems, maps_problems, scan_problems, slot_problems
from tests.support.toolchain import needs_extension

pytestmark = [pytest.mark.slow, needs_extension]
SETS = _extension.build_info().get("instruction_sets", ["baseline"]) if _extension.loaded() else []
SMALLER = SETS[: SETS.index(torch.ops.dan_fast.instruction_set())] if SETS else []
STREAM_TESTS = str(Path(__file__).parent / "memory/test_stream_cpu.py")
STREAM = [STREAM_TESTS, "-k", "not wrong_argument", "-q", "-x", "-p", "no:cacheprovider"]


def results() -> dict[str, Any]:
    images = torch.randint(0, 256, (20, 3, 33, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    exact, rounded = head_problems.results()
    return {
        "set": torch.ops.dan_fast.instruction_set(),
        "scan": scan_problems.results(),
        "head": exact,
        "maps": maps_problems.results(),
        "weights": slot_problems.results(),
        "images": [augment(images, draw(range(20), (33, 17))), normalize(images)],
        "rounded": rounded,
    }


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return results()


@pytest.fixture(scope="module", params=SMALLER)
def there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a process of its own, and the exit code and words of its tests of the passes over a memory."""
    file = tmp_path_factory.mktemp(request.param) / "results.pt"
    code = f"""
import pytest, torch
from tests.kernels.test_instruction_sets import results
found = results()
found["tests"] = int(pytest.main({STREAM}))
torch.save(found, {str(file)!r})
"""
    environment = os.environ | {"DAN_FAST_ISA": request.param}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**torch.load(file), "said": done.stdout[-3000:], "wanted": request.param}


def test_the_passes_over_a_memory_are_right(there: dict[str, Any]):
    """Their sums differ by instruction set; so their tests run again."""
    assert there["set"] == there["wanted"] and there["tests"] == 0, there["said"]


@pytest.mark.parametrize("name", ["scan", "head", "maps", "weights", "images"])
def test_the_same_bits(here: dict[str, Any], there: dict[str, Any], name: str):
    assert len(here[name]) == len(there[name]) > 0
    assert all(map(torch.equal, there[name], here[name]))


def test_the_bottleneck_is_the_same_up_to_rounding(here: dict[str, Any], there: dict[str, Any]):
    """Where * and + may be one operation."""
    for found, wanted in zip(there["rounded"], here["rounded"], strict=True):
        limit = 1e-12 if found.dtype == torch.float64 else 2**-7 if found.dtype.itemsize < 4 else 1e-5
        assert (found - wanted).abs().max() <= limit * (wanted.abs().max() + 1)
