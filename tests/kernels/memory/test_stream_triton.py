"""The Triton kernels under Triton's interpreter, on CPU tensors, against float64 PyTorch; no GPU is needed.

The interpreter is chosen when Triton is imported, so the checks run in a process of their own, which imports this file.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dan_fast import triton_kernels
from dan_fast.core.errors import DanFastError
from tests.support import ROOT
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


def run_all() -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what no kernel writes shows
    for dtype in DTYPES:
        for slots, columns, queries, pending in SHAPES:
            check_products(triton_kernels, Case(slots, columns, queries, dtype))
            check_commit(triton_kernels, Case(slots, columns, queries, dtype, pending))
            if dtype.itemsize == 2:
                case = Case(slots, columns, queries, dtype, pending)
                case.pending_keys = case.pending_keys.to(dtype)
                check_commit(triton_kernels, case)
    # Several programs share the slots of a product.
    for dtype in (torch.float32, torch.bfloat16):
        check_products(triton_kernels, Case(700, 9, 3, dtype))
    check_exact_products(triton_kernels)
    check_special_values(triton_kernels)
    check_three_products_of_tf32()
    check_overlap_refused()


@pytest.mark.slow
@needs_triton
def test_kernels_under_the_interpreter():
    code = "from tests.kernels.memory import test_stream_triton; test_stream_triton.run_all(); print('all ran')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("all ran\n"), done.stderr[-3000:]


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


def test_a_machine_without_triton_gets_one_sentence(monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    )
    triton_kernels.why_not.cache_clear()
    try:
        with pytest.raises(DanFastError, match="memory_scores on a GPU needs Triton: .* run `pip install triton`"):
            _ = triton_kernels.memory_scores
    finally:
        triton_kernels.why_not.cache_clear()


@pytest.mark.slow
def test_importing_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import dan_fast.functional, dan_fast.triton_kernels
assert "does not load" in dan_fast.triton_kernels.why_not() or "not installed" in dan_fast.triton_kernels.why_not()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
