"""The CUDA kernels of the weights and of the false sets without a GPU: their bodies run on host threads."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dan_fast.functional.memory.softmax import SlotSoftmax
from tests.support.slot_problems import F64, literal_sets, sets, weights

SOURCE = Path(__file__).resolve().parent / "weights_on_host.cpp"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-pthread"]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler on this machine")


def build(folder: Path, *flags: str) -> Path:
    target = folder / "weights"
    subprocess.run([COMPILER, *FLAGS, *flags, SOURCE, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("host"), "-O1", "-shared", "-fPIC")))


def call(kernels: ctypes.CDLL, name: str, threads: int, rows: int, slots: int, *arrays: Tensor | None) -> None:
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in arrays]
    getattr(kernels, name)(ctypes.c_uint(threads), ctypes.c_int64(rows), ctypes.c_int64(slots), *pointers)


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output filled with rubbish, and the whole allocation: a few elements more on either side."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 8,), 77, dtype=dtype)
    return whole[4 : 4 + size].view(shape), whole


def untouched(*wholes: Tensor) -> bool:
    return all((x[:4] == 77).all() and (x[-4:] == 77).all() for x in wholes)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("threads, slots", [(32, 1), (32, 70), (64, 63), (96, 300), (64, 0)])
@pytest.mark.parametrize("fill", [0.6, None, 0.0])
def test_weights_and_gradients(kernels, threads: int, slots: int, fill: float | None, dtype: torch.dtype):
    problem = weights(slots, fill=fill, zeros=False)
    keys, features, factors = (x.to(dtype) for x in (problem.keys, problem.slots, problem.factors))
    tensors = [keys @ features.mT, features.square().sum(1), keys.square().sum(1)]
    tensors[0][:, 3:4] = 0.0
    tensors[1][3:4] = 0.0
    name = str(dtype).removeprefix("torch.")
    exact = [x.to(F64).requires_grad_() for x in tensors]
    expected = SlotSoftmax.form(*exact, problem.occupied)
    gradients = torch.autograd.grad(expected, exact, factors.to(F64))
    tolerance = 1e-12 if dtype == F64 else 3e-6

    found = []
    for _ in range(2):
        result, whole = guarded(5, slots, dtype=dtype)
        call(kernels, f"softmax_{name}", threads, 5, slots, *tensors, problem.occupied, result)
        shapes = ((5, slots), (slots,), (5,), (5,))
        outputs, wholes = zip(*(guarded(*shape, dtype=dtype) for shape in shapes), strict=True)
        call(kernels, f"softmax_backward_{name}", threads, 5, slots, *tensors, factors, result, *outputs)
        assert untouched(whole, *wholes)
        found.append((result, *outputs))
    for a, b in zip(found[0], (expected, *gradients), strict=False):
        b = b.detach()
        ordinary = b.abs() < 1e6  # all but the gradients at the slot of norm 0
        scale = max(b[ordinary].abs().tolist(), default=0.0)
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)
    assert all(map(torch.equal, *found))


def test_an_empty_slot_takes_no_infinite_gradient_and_a_bad_key_shows_in_its_row_only(kernels):
    problem = weights(40, zeros=False)
    tensors = [problem.keys @ problem.slots.mT, problem.slots.square().sum(1), problem.keys.square().sum(1)]
    tensors[2][1] = torch.inf
    tensors[0][:, ~problem.occupied] = torch.nan
    result, by_scores = torch.full((5, 40), -1.0, dtype=F64), torch.full((5, 40), -1.0, dtype=F64)
    call(kernels, "softmax_float64", 64, 5, 40, *tensors, problem.occupied, result)
    assert result[1, problem.occupied].isnan().all() and not result[:, ~problem.occupied].any()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(result[others].sum(1), torch.ones(4, dtype=F64))
    grad = torch.where(problem.occupied, problem.factors, torch.inf)
    rest = [torch.empty(n, dtype=F64) for n in (40, 5, 5)]
    call(kernels, "softmax_backward_float64", 64, 5, 40, *tensors, grad, result, by_scores, *rest)
    assert by_scores[others].isfinite().all() and rest[1][others].isfinite().all()
    assert not by_scores[:, ~problem.occupied].any()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["random", "close", "ties", "equal", "odd"])
@pytest.mark.parametrize("threads, slots", [(32, 1), (64, 63), (96, 300)])
def test_sets(kernels, threads: int, slots: int, kind: str, dtype: torch.dtype):
    evaluation, labels, pseudo_labels = sets(slots, kind=kind, batch=4)
    evaluation = evaluation.to(dtype)
    outputs, wholes = zip(*(guarded(4, slots, dtype=torch.uint8) for _ in range(2)), strict=True)
    name = f"false_sets_{str(dtype).removeprefix('torch.')}"
    call(kernels, name, threads, 4, slots, evaluation, labels, pseudo_labels, *outputs)
    assert untouched(*wholes) and all((x <= 1).all() for x in outputs)
    expected = literal_sets(evaluation, labels, pseudo_labels)
    for found, members in zip(outputs, expected, strict=True):
        assert torch.equal(found.bool(), members)


def test_slots_of_more_than_two_digits(kernels):
    evaluation, labels, pseudo_labels = sets(70000, kind="equal", batch=1, classes=2)
    outputs = [torch.full((1, 70000), 9, dtype=torch.uint8) for _ in range(2)]
    call(kernels, "false_sets_float32", 64, 1, 70000, evaluation.float(), labels, torch.tensor([1]), *outputs)
    for found, members in zip(outputs, literal_sets(evaluation, labels, torch.tensor([1])), strict=True):
        assert torch.equal(found.bool(), members) and members.any()


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_data_race_and_nothing_out_of_bounds(tmp_path: Path, sanitizer: str):
    flags = ["-O0", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    probe = [COMPILER, "-x", "c++", *flags, "-", "-o", os.devnull]
    if subprocess.run(probe, input="int main() {}", capture_output=True, text=True).returncode != 0:
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    program = build(tmp_path, *flags, "-DWEIGHTS_ON_HOST_MAIN")
    # Thread sanitizers of before 2024 do not start where addresses are much randomised.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    if fixed and subprocess.run([*fixed, "true"], capture_output=True).returncode != 0:
        fixed = []
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([*fixed, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[:3000]
