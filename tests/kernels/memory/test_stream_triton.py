"""The Triton kernels under Triton's interpreter, on CPU tensors, against float64 PyTorch; no GPU is needed.

The interpreter is chosen when Triton is imported, so the checks run in a process of their own, which imports this file.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dan_fast import triton_kernels
from dan_fast.core.errors import DanFastError

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; it exists for Linux only"
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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


def problem(dtype: torch.dtype, slots: int, dim: int, steps: int, pending: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(slots + dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    base = normal(slots, dim).to(dtype)
    kept = (normal(slots) > -0.5).to(wide)
    base[kept == 0] = float("nan")
    if slots > 3:
        kept[3], base[3] = 0.75, 1.5
    weights = normal(pending, slots).abs().to(wide)
    return base, kept, weights, normal(pending, dim).to(wide), normal(steps, dim).to(wide)


def within(result: Tensor, exact: Tensor, same_precision: Tensor, scale: Tensor) -> bool:
    """At most twice the error of PyTorch in the same precision, or one rounding where that one was lucky."""
    assert result.shape == exact.shape and torch.isfinite(result).all()
    ulp = torch.finfo(result.dtype).eps * scale.abs().max() if scale.numel() else 0.0
    if result.dtype == torch.float64:
        ulp *= 8  # the exact value is itself rounded
    error, pytorch = ((x.double() - exact).abs().max() if exact.numel() else 0.0 for x in (result, same_precision))
    return bool(error <= 2 * pytorch + ulp)


def check_products(dtype: torch.dtype, slots: int, dim: int, steps: int) -> None:
    base, _, weights, _, keys = problem(dtype, slots, dim, steps, steps)
    base = base.nan_to_num(2.0)
    wide = keys.dtype
    scores, norms = triton_kernels.memory_scores(keys, base)
    assert scores.dtype == norms.dtype == wide
    exact = keys.double() @ base.double().T
    assert within(scores, exact, keys @ base.to(wide).T, exact)
    squares = base.double().square().sum(1)
    assert within(norms, squares, base.to(wide).square().sum(1), squares)
    combined = triton_kernels.memory_combine(weights, base)
    exact = weights.double() @ base.double()
    assert combined.dtype == wide and within(combined, exact, weights @ base.to(wide), exact)
    assert torch.equal(combined, triton_kernels.memory_combine(weights, base))


def check_commit(dtype: torch.dtype, slots: int, dim: int, steps: int, pending: int, half_keys: bool) -> None:
    base, kept, weights, pending_keys, keys = problem(dtype, slots, dim, steps, pending)
    if half_keys:
        pending_keys = pending_keys.to(dtype)
    before, wide = base.clone(), keys.dtype
    features, norms = triton_kernels.memory_commit(base, kept, weights, pending_keys)
    assert torch.equal(base.nan_to_num(7.0), before.nan_to_num(7.0)), "the memory that came in is changed"
    held = base.double().masked_fill(kept[:, None] == 0, 0.0) * kept.double()[:, None]
    exact = held + weights.double().T @ pending_keys.double()
    plain = (held.to(wide) + weights.T @ pending_keys.to(wide)).to(dtype)
    # The interpreter truncates to bfloat16, where the hardware rounds to the nearest (test_triton_compile).
    assert within(features, exact, plain, exact * (2 if dtype == torch.bfloat16 else 1))
    stored = features.double()
    squares = stored.square().sum(1)
    assert within(norms, squares, features.to(wide).square().sum(1), squares)

    padded = torch.full((slots, dim + 3), float("nan"), dtype=dtype)
    padded[:, :dim] = base
    for memory in (base, padded[:, :dim]):
        scores, norms_in_place = triton_kernels.memory_commit_scores_(memory, kept, weights, pending_keys, keys)
        assert torch.equal(memory, features), "in place and out of place differ"
        assert torch.equal(norms_in_place, norms)
        exact = keys.double() @ stored.T
        assert within(scores, exact, keys @ features.to(wide).T, exact)
    assert padded[:, dim:].isnan().all(), "it wrote beyond the columns"


def check_exact_products() -> None:
    """Every bit of a float32 key and weight counts against a bfloat16 memory."""
    odd = 1 + 2**-10 + 2**-23
    one = torch.ones(1, 1)
    base = one.bfloat16()
    assert triton_kernels.memory_scores(one * odd, base)[0].item() == odd
    assert triton_kernels.memory_combine(one * odd, base).item() == odd
    # 1.0039... is halfway between two bfloat16: weights cut to 16 bits would be cut to 1.
    minus = (one * -odd).bfloat16()
    written = triton_kernels.memory_commit(minus, one[0], one * odd, one.bfloat16())[0].item()
    assert abs(written - (odd - 1)) <= 2**-8 * (odd - 1)


def check_special_values() -> None:
    base = torch.tensor([[float("nan"), float("inf")], [1.0, 2.0], [float("nan"), 1.0]])
    kept, weights, key = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([[2.0, 4.0]])
    features, norms = triton_kernels.memory_commit(base, kept, weights, key)
    assert features[:2].tolist() == [[1.0, 2.0], [1.0, 2.0]] and norms[:2].tolist() == [5.0, 5.0]
    assert str(features[2].tolist()) == "[nan, 1.0]" and norms[2].isnan(), (
        "NaN must not be hidden in a slot that is kept"
    )
    scores, _ = triton_kernels.memory_scores(key, base)
    assert str(scores.tolist()) == "[[nan, 10.0, nan]]"


def check_three_products_of_tf32() -> None:
    """Nearly as exact as float32, a thousandfold as one of TF32 would be; the interpreter rounds the parts for it."""
    base, _, weights, _, keys = problem(torch.float32, 64, 300, 16, 16)
    base = base.nan_to_num(2.0)
    exact = keys.double() @ base.double().T, weights.double() @ base.double()
    results = {}
    for kind in ("float32", "tf32x3"):
        with triton_kernels.float32_products(kind):
            results[kind] = triton_kernels.memory_scores(keys, base)[0], triton_kernels.memory_combine(weights, base)
            check_commit(torch.float32, 33, 45, 31, 16, False)
            check_special_values()
    for number, of_exact in enumerate(exact):
        single, triple = results["float32"][number], results["tf32x3"][number]
        assert not torch.equal(single, triple), "the setting did not reach the kernel"
        errors = [(x - of_exact).square().mean().sqrt().item() for x in (single, triple)]
        print(f"tf32x3 errs {errors[1] / errors[0]:.2f} times as much as float32")
        assert errors[1] < 1.5 * errors[0]
    with triton_kernels.float32_products("tf32x3"):
        for dtype in (torch.bfloat16, torch.float64):
            check_products(dtype, 33, 45, 31)
        check_exact_products()


def check_overlap_refused() -> None:
    base, one = torch.ones(1, 4).expand(3, 4), torch.ones(3)
    for memory in (base, torch.ones(4, 3).T):
        with pytest.raises(ValueError, match="base must have adjacent columns"):
            triton_kernels.memory_commit_scores_(memory, one, torch.ones(0, 3), torch.ones(0, 4), torch.ones(0, 4))


def run_all() -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what no kernel writes shows
    for dtype in DTYPES:
        for slots, dim, steps, pending in SHAPES:
            check_products(dtype, slots, dim, steps)
            half = dtype in (torch.bfloat16, torch.float16)
            for half_keys in (False, True) if half else (False,):
                check_commit(dtype, slots, dim, steps, pending, half_keys)
    # Several programs share the slots of a product.
    check_products(torch.float32, 700, 9, 3)
    check_products(torch.bfloat16, 700, 9, 3)
    check_exact_products()
    check_special_values()
    check_three_products_of_tf32()
    check_overlap_refused()


@pytest.mark.slow
@needs_triton
def test_kernels_under_the_interpreter():
    code = "import test_stream_triton; test_stream_triton.run_all(); print('all ran')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
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
