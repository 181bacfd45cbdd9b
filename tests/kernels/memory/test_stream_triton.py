"""The Triton kernels under Triton's interpreter, on CPU tensors, against float64 PyTorch; no GPU is needed.

The interpreter is chosen when Triton is imported, so the checks run in a process of their own, which imports this file.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dan_fast import triton_kernels
from dan_fast.core.errors import DanFastError
from tests.support import ROOT
from tests.support.devices import as_it_lies, whole
from tests.support.stream_problems import (
    DTYPES,
    Case,
    check_commit,
    check_exact_products,
    check_products,
    check_special_values,
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; it exists for Linux only"
)
# slots, columns, keys, pending keys: odd, empty, one more and one less than a block, several passes.
SHAPES = (
    (1, 1, 1, 1),
    (33, 45, 31, 16),
    (34, 45, 16, 33),
    (35, 20, 33, 17),
    (70, 33, 65, 64),
    (32, 17, 130, 150),
    (31, 32, 64, 65),
    (5, 7, 0, 3),
    (4, 6, 3, 0),
    (0, 5, 3, 2),
    (6, 5, 0, 0),
)


def check_three_products_of_tf32() -> None:
    """Nearly as exact as float32, a thousandfold as one of TF32 would be; the interpreter rounds the parts for it."""
    case = Case(64, 300, 16, torch.float32)
    for x in (case.keys, case.weights, case.base):
        x.abs_()
    keys, weights, base = (x.double() for x in (case.keys, case.weights, case.base))
    exact = keys @ base.T, weights @ base
    results = {}
    for kind in ("float32", "tf32x3"):
        with triton_kernels.float32_products(kind):
            scores, _ = triton_kernels.memory_scores(case.keys, case.base)
            results[kind] = scores, triton_kernels.memory_combine(case.weights, case.base)
            check_commit(triton_kernels, Case(33, 45, 31, torch.float32, 16))
            check_special_values(triton_kernels)
    for of_exact, single, triple in zip(exact, *results.values(), strict=True):
        assert not torch.equal(single, triple), "the setting did not reach the kernel"
        errors = [(x - of_exact).square().mean().sqrt().item() for x in (single, triple)]
        print(f"tf32x3 errs {errors[1] / errors[0]:.2f} times as much as float32")
        assert errors[1] < 1.5 * errors[0]
    with triton_kernels.float32_products("tf32x3"):
        for dtype in (torch.bfloat16, torch.float64):
            check_products(triton_kernels, Case(33, 45, 31, dtype))
        check_exact_products(triton_kernels)


def check_overlap_refused() -> None:
    base, one = torch.ones(1, 4).expand(3, 4), torch.ones(3)
    for memory in (base, torch.ones(4, 3).T):
        with pytest.raises(ValueError, match="base must have adjacent columns"):
            triton_kernels.memory_commit_scores_(memory, one, torch.ones(0, 3), torch.ones(0, 4), torch.ones(0, 4))


def check_all(ops: Any) -> None:
    for dtype in DTYPES:
        for slots, columns, queries, pending in SHAPES:
            check_products(ops, Case(slots, columns, queries, dtype))
            check_commit(ops, Case(slots, columns, queries, dtype, pending))
            if dtype.itemsize == 2:
                case = Case(slots, columns, queries, dtype, pending)
                case.pending_keys = case.pending_keys.to(dtype)
                check_commit(ops, case)
    # Several programs share the slots of a product.
    for dtype in (torch.float32, torch.bfloat16):
        check_products(ops, Case(700, 9, 3, dtype))
    check_exact_products(ops)
    check_special_values(ops)


def run_all() -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what no kernel writes shows
    check_all(triton_kernels)
    check_three_products_of_tf32()
    check_overlap_refused()


@pytest.mark.slow
@needs_triton
def test_kernels_under_the_interpreter():
    code = "from tests.kernels.memory import test_stream_triton; test_stream_triton.run_all(); print('all ran')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("all ran\n"), done.stderr[-3000:]


class OnGpu:
    """The kernels on a GPU for tensors of the CPU, where their rows lie as far apart, and back."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*arguments: Tensor) -> Any:
            there = [as_it_lies(x, "cuda") for x in arguments]
            results = getattr(triton_kernels, name)(*there)
            whole(arguments[0]).copy_(whole(there[0]))  # a commit in place
            return results.cpu() if isinstance(results, Tensor) else tuple(x.cpu() for x in results)

        return run


@pytest.mark.gpu
def test_kernels_on_the_gpu():
    check_all(OnGpu())


@needs_triton
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"base": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "base must be float64"),
        ({"base": torch.ones(3)}, ValueError, r"base must be \(s, d\)"),
        ({"kept": torch.ones(4)}, ValueError, r"kept must be \(3,\)"),
        ({"weights": torch.ones(3, 2)}, ValueError, r"weights must be \(2, 3\)"),
        ({"weights": torch.ones(2, 3).bfloat16()}, TypeError, "weights must be torch.float32"),
        ({"pending_keys": torch.ones(2, 5)}, ValueError, r"pending_keys must be \(2, 4\)"),
        ({"pending_keys": torch.ones(2, 4).half()}, TypeError, "pending_keys must be torch.float32"),
        ({"keys": torch.ones(6, 4).double()}, TypeError, "keys must be torch.float32"),
        (
            {"keys": torch.ones(1, 1).expand(5_000_000, 4)},
            ValueError,
            "keys must have at most 4,194,240 rows, got 5,000",
        ),
        ({"keys": torch.ones(6, 4, device="meta")}, ValueError, "keys must be on the memory's device cpu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], error: type[Exception], message: str):
    arguments = {
        "base": torch.ones(3, 4),
        "kept": torch.ones(3),
        "weights": torch.ones(2, 3),
        "pending_keys": torch.ones(2, 4),
        "keys": torch.ones(6, 4),
    }
    with pytest.raises(error, match=message):
        triton_kernels.memory_commit_scores_(**{**arguments, **change})


def test_the_kind_of_products_is_put_back_and_checked():
    with pytest.raises(KeyError), triton_kernels.float32_products("tf32x3"):
        assert triton_kernels.products_now() == "tf32x3"
        raise KeyError
    assert triton_kernels.products_now() == "float32"
    with pytest.raises(ValueError, match="^kind must be one of float32, tf32x3, got 'tf32'"):
        with triton_kernels.float32_products("tf32"):
            pass


@pytest.fixture
def afresh() -> Iterator[None]:
    """Forgets what is known of Triton, before and after."""
    for cache in (caches := (triton_kernels.why_not, triton_kernels._why_no_launcher)):
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_machine_without_triton_gets_one_sentence(afresh: None, monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    )
    with pytest.raises(DanFastError, match="memory_scores on a GPU needs Triton: .* run `pip install triton`"):
        _ = triton_kernels.memory_scores


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, driver: Callable[[], object]) -> None:
    """GPUs that serve, for which Triton makes its driver by `driver`."""
    import triton

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(lambda self: driver()))


@needs_triton
@pytest.mark.parametrize(
    "error, reason, remedy",
    [
        (RuntimeError("Failed to find C compiler. Please specify"), "Failed to find C compiler", "install gcc and"),
        (
            subprocess.CalledProcessError(1, ["/bin/gcc", "a.c", "-l:libcuda.so.1"]),
            "/bin/gcc ended with",
            "install gcc",
        ),
        (FileNotFoundError(2, "No such file", "cc-9"), "[Errno 2] No such file: 'cc-9'", "install gcc and"),
        (PermissionError(13, "Permission denied", "/root/.triton"), "denied: '/root/.triton'", "set TRITON_CACHE_DIR"),
        (ImportError("failed to map segment from shared object"), "failed to map", "set TRITON_CACHE_DIR"),
        (AssertionError("libcuda.so cannot found!\nPlease"), "libcuda.so cannot found)", "set TRITON_LIBCUDA_PATH"),
        (AssertionError(), "(AssertionError)", "install gcc"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_gpu_whose_launcher_cannot_be_built_gets_one_sentence_once(
    afresh: None, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, remedy: str
):
    tried = []

    def driver() -> object:
        tried.append(error)
        raise error

    pretend_gpus(monkeypatch, driver)
    found = {triton_kernels.why_not(device) for device in (0, 1, 0)}
    (sentence,) = found
    assert sentence.startswith("Triton cannot build what launches its kernels (")
    assert reason in sentence and f"); {remedy}" in sentence and "\n" not in sentence and ". " not in sentence
    assert len(tried) == 1, "a compiler that fails takes its time"
    assert triton_kernels.why_not() is None


@needs_triton
@pytest.mark.parametrize("writable", [True, False])
def test_a_gpu_whose_launcher_is_there_is_served_where_kernels_can_be_kept(
    afresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, writable: bool
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path) if writable else "/sys")  # where not even root makes a file
    pretend_gpus(monkeypatch, lambda: SimpleNamespace(utils=object()))
    found = triton_kernels.why_not(0)
    assert found is None if writable else "set TRITON_CACHE_DIR" in found


@needs_triton
@pytest.mark.compile
@pytest.mark.parametrize("lacking", ["compiler", "headers", "folder"])
def test_what_triton_itself_says_of_a_machine_is_understood(
    afresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: str
):
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if (compiler := shutil.which("gcc") or shutil.which("clang")) is None:
        pytest.skip("neither gcc nor clang is installed")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / ("file" if lacking == "folder" else "cache")))
    if lacking == "headers":
        monkeypatch.setattr(sysconfig, "get_paths", lambda **options: {"include": str(tmp_path)})
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    find = getattr(build, "_find_compiler", None)
    if hasattr(find, "cache_clear"):
        find.cache_clear()
    # The driver's library is not there without a GPU.
    monkeypatch.setattr(driver, "library_dirs", lambda: [])
    pretend_gpus(monkeypatch, lambda: SimpleNamespace(utils=driver.CudaUtils()))
    remedy = "set TRITON_CACHE_DIR" if lacking == "folder" else "install gcc and Python's headers"
    assert f"); {remedy}" in triton_kernels.why_not(0)
