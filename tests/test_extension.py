"""The compiled extension and its first operator: values, paths, derivatives, and life without a compiler."""

import ctypes
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dan_fast import _extension
from dan_fast.functional.memory.row_norms import row_sq_norms
from dan_fast.nn import ProgressiveAugmentedMemory
from tests.support import in_checkout
from tests.support.examples import examples
from tests.support.running import Called, by_threads, new_memory_poisoned
from tests.support.toolchain import COMPILER, build_on_host, needs_compiler, needs_extension
from tests.support.warned import own_warnings

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def literal(features: Tensor) -> Tensor:
    """The definition, in float64, with none of the code under test."""
    return torch.tensor([sum(v * v for v in row) for row in features.double().tolist()], dtype=torch.float64)


@needs_compiler
def test_a_machine_with_a_compiler_has_the_extension():
    assert _extension.loaded(), _extension.why_not()
    assert _extension.why_not() is None and _extension.why_not_on("cpu") is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")
def test_a_machine_with_nvcc_has_the_cuda_kernels():
    assert _extension.has_cuda_kernels(), _extension.build_info()
    assert _extension.build_info()["cuda_archs"]


@pytest.mark.compile
@needs_compiler
def test_a_set_of_instructions_the_compiler_does_not_know_is_left_out(tmp_path: Path):
    sets = runpy.run_path(str(in_checkout("setup.py")))["instruction_sets"]
    on_x86 = platform.machine() == "x86_64"
    assert list(sets([COMPILER])) == (["baseline", "avx2", "avx512"] if on_x86 else ["baseline"])
    old = tmp_path / "c++"
    old.write_text('#!/bin/sh\ncase "$*" in *avx512*) exit 1;; esac\n')
    old.chmod(0o700)
    assert list(sets([str(old)])) == ["baseline", "avx2"]


@pytest.mark.slow
@needs_extension
def test_the_instruction_set_is_one_that_was_built_and_an_unknown_one_is_refused():
    assert torch.ops.dan_fast.instruction_set() in _extension.build_info()["instruction_sets"]
    command = [sys.executable, "-m", "dan_fast", "doctor"]
    refused = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DAN_FAST_ISA": "sse9"})
    sentence = "The environment variable DAN_FAST_ISA is 'sse9'; set it to baseline, avx2 or avx512, or unset it."
    assert (refused.returncode, refused.stderr) == (1, f"dan-fast: {sentence}\n") and refused.stdout == ""


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_binary_needs_only_the_stable_abi():
    listing = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", _extension.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in listing
    assert not re.findall(r"\b(?:c10|at|torch)::.*", listing)
    assert not re.findall(r"\bPy[A-Z_]\w+", listing)
    needed = re.findall(r"^\s+U ((?:aoti_)?torch_\w+)", listing, flags=re.MULTILINE)
    of_a_cpu_build = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    assert [name for name in needed if not hasattr(of_a_cpu_build, name)] == []


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (5, 8), (63, 33), (100, 64), (17, 2045), (1000, 15)])
def test_values_on_the_kernel(dtype: torch.dtype, rows: int, columns: int):
    features = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    with Called() as called:
        norms = row_sq_norms(features)
    assert "dan_fast::row_sq_norms" in called.names and "aten::sum.dim_IntList" not in called.names
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = literal(features)
    tolerance = 1e-14 if dtype == torch.float64 else 2**-24
    assert ((norms.double() - exact).abs() <= tolerance * exact).all(), "a float result is rounded once"


@needs_extension
@examples(60)
@given(rows=st.integers(0, 40), columns=st.integers(0, 70), seed=st.integers(0, 2**31 - 1))
def test_any_shape(rows: int, columns: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(row_sq_norms(features), literal(features), rtol=1e-13, atol=0)


def test_large_memory_agrees_with_pytorch():
    features = torch.randn(9000, 205, generator=torch.Generator().manual_seed(0))
    expected = features.double().square().sum(1)
    error = (row_sq_norms(features) - expected).abs().max()
    assert error <= 2 * (features.square().sum(1) - expected).abs().max()


def test_any_strides():
    wide = torch.randn(12, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for view in (wide.T, wide[:, :33], wide[::3, 5:], wide[:, ::2], wide[:1].expand(6, 40), wide[3:3]):
        torch.testing.assert_close(row_sq_norms(view), literal(view), rtol=1e-13, atol=0)
    assert torch.equal(row_sq_norms(wide[:, :0]), torch.zeros(12, dtype=torch.float64))


def test_every_result_is_written():
    with new_memory_poisoned():
        for columns in (0, 1, 2045):
            assert torch.isfinite(row_sq_norms(torch.ones(63, columns))).all()


def test_nan_and_overflow_stay_in_their_row():
    features = torch.ones(4, 9)
    features[1, 8], features[2, 0] = float("nan"), 3e38
    assert [str(v) for v in row_sq_norms(features).tolist()] == ["9.0", "nan", "inf", "9.0"]


def test_the_same_bits_whatever_the_number_of_threads():
    features = torch.randn(700, 301, generator=torch.Generator().manual_seed(2))
    first, *others = by_threads(lambda: row_sq_norms(features))
    assert all(torch.equal(result, first) for result in others)


@pytest.mark.parametrize("path", ["kernel", "pytorch"])
def test_first_and_second_derivatives(path: str, monkeypatch: pytest.MonkeyPatch):
    if path == "kernel" and not _extension.loaded():
        pytest.skip(f"no extension: {_extension.why_not()}")
    monkeypatch.setattr(_extension, "serves", lambda *device: path == "kernel")
    features = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    features.requires_grad_()
    assert torch.autograd.gradcheck(row_sq_norms, features)
    assert torch.autograd.gradgradcheck(row_sq_norms, features)
    # A loss on a gradient: sum_i |d n2_i^2 / d m_i|^2 = 16 n2_i^3, whose derivative is 96 n2_i^2 m_i.
    norms = row_sq_norms(features)
    (grad,) = torch.autograd.grad(norms.square().sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), features)
    torch.testing.assert_close(second, 96 * norms[:, None].square() * features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gradient_has_the_type_of_the_features(dtype: torch.dtype):
    features = torch.tensor([[0.5, -3.0], [2.0, 0.25]], dtype=dtype, requires_grad=True)
    row_sq_norms(features).backward(torch.tensor([1.0, -2.0]))
    assert features.grad is not None and features.grad.dtype == dtype
    assert features.grad.tolist() == [[1.0, -6.0], [-8.0, -1.0]]


@pytest.mark.compile
def test_compiles_as_one_graph():
    features = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(lambda x: row_sq_norms(x).log().sum(), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(features), features)
    torch.testing.assert_close(grad, 2 * features / features.square().sum(1, keepdim=True))


@pytest.mark.parametrize(
    "features, error",
    [
        (torch.ones(3), ValueError),
        (torch.ones(2, 3, 4), ValueError),
        (torch.ones(2, 3, dtype=torch.int64), TypeError),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError),
        ([[1.0]], TypeError),
    ],
)
def test_wrong_arguments_are_named(features: object, error: type[Exception]):
    with pytest.raises(error, match="features must be"):
        row_sq_norms(features)


def test_without_the_extension_pytorch_serves_and_one_warning_says_why(
    forget: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    info = tmp_path / "info.json"
    info.write_text('{"missing": ["no compiled extension: there is no C++ compiler; get g++"]}')
    monkeypatch.setattr(_extension, "LIBRARY", tmp_path / "absent.so")
    monkeypatch.setattr(_extension, "BUILD_INFO", info)
    features = torch.arange(6.0).reshape(2, 3).bfloat16().requires_grad_()
    with warnings.catch_warnings(record=True) as caught, Called() as called:
        warnings.simplefilter("always")
        results = [row_sq_norms(features) for _ in range(3)]
    (warning,) = own_warnings(caught)
    said = "dan_fast takes its PyTorch path on cpu: no compiled extension: there is no C++ compiler; get g++"
    assert str(warning.message) == said and warning.filename == __file__
    _extension._warn_once.cache_clear()
    memory = ProgressiveAugmentedMemory(labeled_slots=2, unlabeled_slots=2, key_dim=3)
    with pytest.warns(RuntimeWarning, match="PyTorch path on cpu") as caught:
        memory(torch.ones(1, 3), torch.tensor([0]), torch.ones(1, 3), torch.tensor([0]))
    assert own_warnings(caught)[0].filename == __file__, "a module is called by way of PyTorch"
    assert "dan_fast::row_sq_norms" not in called.names
    assert results[0].tolist() == [5.0, 50.0] and results[0].dtype == torch.float32
    assert not _extension.loaded() and not _extension.has_cuda_kernels()


def test_a_library_that_does_not_load_is_named(forget: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "LIBRARY", broken)
    found = _extension.why_not() or ""
    assert re.search(
        r"_native.so does not load with torch .*; reinstall dan_fast \(from a checkout: pip install -e", found
    )
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert row_sq_norms(torch.ones(1, 4)).item() == 4


def test_other_devices_take_pytorch_without_a_warning(forget: None):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert row_sq_norms(torch.ones(3, 4, device="meta")).shape == (3,)


@pytest.fixture(scope="module")
def kernel_on_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_on_host("memory/row_norms_on_host.cpp", tmp_path_factory.mktemp("host") / "row_norms", "-O1")


@pytest.mark.compile
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows, columns, stride", [(1, 1, 1), (2, 31, 32), (5, 33, 33), (3, 2045, 2048), (4, 0, 3)])
def test_the_cuda_kernel_run_on_host_threads(
    kernel_on_host: Path, dtype: torch.dtype, rows: int, columns: int, stride: int
):
    features = torch.randn(rows, stride, generator=torch.Generator().manual_seed(4), dtype=dtype)
    features[:, columns:] = float("nan")  # the padding is not read
    command = [kernel_on_host, str(dtype).removeprefix("torch."), *map(str, (rows, columns, stride))]
    done = subprocess.run(command, input=features.numpy().tobytes(), capture_output=True, check=True)
    norms = torch.frombuffer(bytearray(done.stdout), dtype=dtype)
    assert norms[0] == -1 and norms[-1] == -1, "it wrote beyond its rows"
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(norms[1:-1].double(), literal(features[:, :columns]), rtol=tolerance, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_on_the_gpu(dtype: torch.dtype):
    features = torch.randn(1000, 2045, generator=torch.Generator().manual_seed(5)).to(dtype).cuda()
    for view in (features, features[:, :2040], features.T, features[:0]):
        with Called() as called:
            norms = row_sq_norms(view)
        assert ("dan_fast::row_sq_norms" in called.names) == (_extension.why_not_on("cuda") is None)
        exact = view.double().square().sum(1)
        torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
        assert torch.equal(norms, row_sq_norms(view))
