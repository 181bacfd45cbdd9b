"""The Triton kernels compiled ahead of time for sm_86 and sm_90: registers, spills, shared memory; no GPU is needed."""

import importlib.util
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import pytest
import torch


def why_not_compile() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it exists for Linux only"
    import triton

    try:
        for tool in (triton.knobs.nvidia.ptxas, triton.knobs.nvidia.cuobjdump):
            assert tool.path
    except (AttributeError, RuntimeError) as error:
        return f"Triton finds no ptxas or cuobjdump ({error})"
    return None


REASON = why_not_compile()
pytestmark = [pytest.mark.compile, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

SHARED_LIMIT = {86: 99 * 1024, 90: 227 * 1024}
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
f64, f32, bf16, f16 = TYPES
# Storage, dtype of pending keys, pending keys (None: no commit), keys.
PASSES = (
    (f32, f32, 64, 64),
    (f32, f32, 32, 32),
    (f32, f32, 128, 128),
    (f32, f32, 64, 0),
    (f32, None, None, 64),
    (f32, None, None, 32),
    (bf16, bf16, 64, 64),
    (bf16, bf16, 32, 32),
    (bf16, None, None, 64),
    (bf16, None, None, 32),
    (f64, f64, 64, 64),
    (f16, f16, 64, 64),
)
COMBINES = (f32, bf16, f16)


class Resources(NamedTuple):
    """Registers and stack (bytes, spills included) of a thread, shared memory (bytes) of a program."""

    registers: int
    stack: int
    shared: int
    ptx: str
    ttir: str


def compiled(kernel: Any, plan: Any, types: dict[str, str], arch: int) -> Resources:
    """`types` of the pointers; arguments that are None are left out of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    scalars = {"base_stride", "target_stride", "slots", "dim", "pending", "steps", "share"}
    signature, constants = {}, dict(plan.constants)
    for name in kernel.arg_names:
        signature[name] = types.get(name, "i32" if name in scalars else "constexpr")
        if signature[name] == "constexpr":
            constants.setdefault(name, None)
    # PyTorch's allocations are aligned; sizes such as 2045 are not.
    attributes = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name in types}
    options = {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    return Resources(
        int(found[1]), int(found[2]) + int(found[3]), binary.metadata.shared, binary.asm["ptx"], binary.asm["ttir"]
    )


def check(resources: Resources, arch: int, title: str, tf32: bool = False) -> None:
    line = f"{title:44} {resources.registers:4} registers {resources.stack:4} stack {resources.shared:7} B shared"
    print(line)
    assert resources.stack == 0, f"it spills: {line}"
    assert resources.shared <= SHARED_LIMIT[arch], line
    assert ("tf32" in resources.ptx) == tf32


def row_offsets(ttir: str, matrix: str) -> set[str]:
    """The integer types of what is added to a pointer argument where the rows of its blocks start."""
    # A program's own rows begin further on.
    own = re.findall(rf"(%\S+) = tt\.addptr %{matrix}, ", ttir)
    starts = {start for name in (f"%{matrix}", *own) for start in re.findall(rf"(%\S+) = tt\.splat {name} :", ttir)}
    sums = re.findall(r"tt\.addptr (%\S+), %\S+ : tensor<\S+>, tensor<\w+x(i\d+)>", ttir)
    return {integer for start, integer in sums if start in starts}


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("storage, pending_dtype, pending, steps", PASSES)
def test_the_pass(storage: torch.dtype, pending_dtype: torch.dtype | None, pending: int | None, steps: int, arch: int):
    from dan_fast.triton_kernels import passes

    wide = torch.float64 if storage == f64 else torch.float32
    plan = passes.plan_pass(storage, wide, pending, pending_dtype, steps)
    types = {"base": "*" + TYPES[storage], "square_norms": "*" + TYPES[wide]}
    if pending is not None:
        types |= {"target": "*" + TYPES[storage], "kept": "*" + TYPES[wide], "weights": "*" + TYPES[wide]}
        types["pending_keys"] = "*" + TYPES[pending_dtype]
    if steps:
        types |= {"keys": "*" + TYPES[wide], "scores": "*" + TYPES[wide]}
    resources = compiled(passes.memory_pass, plan, types, arch)
    check(resources, arch, f"sm_{arch} pass {TYPES[storage]} pending {pending} keys {steps}")
    tensor_cores = re.search(r"\bw?g?mma\S*\.bf16", resources.ptx)
    assert bool(tensor_cores) == (storage == bf16)
    if storage in (bf16, f16) and pending is not None:
        assert re.search(rf"cvt\.rn\.{TYPES[storage].replace('fp', 'f')}(x2)?\.f32", resources.ptx), "truncated to half"
    for matrix in {"base", "target", "keys", "pending_keys", "weights"} & set(types):
        assert row_offsets(resources.ttir, matrix) == {"i64"}, f"{matrix}, or what lies in it, may be longer than 2^31"


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("steps", [32, 64])
@pytest.mark.parametrize("storage", COMBINES)
def test_the_combination(storage: torch.dtype, steps: int, arch: int):
    from dan_fast.triton_kernels import passes

    plan = passes.plan_combine(storage, f32, steps)
    types = {"base": "*" + TYPES[storage], "weights": "*fp32", "parts": "*fp32"}
    check(compiled(passes.combine_pass, plan, types, arch), arch, f"sm_{arch} combine {TYPES[storage]} {steps}")


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("pending, steps", [(64, 64), (32, 32), (None, 64), (None, 32)])
def test_three_products_of_tf32(pending: int | None, steps: int, arch: int):
    from dan_fast.triton_kernels import float32_products, passes

    with float32_products("tf32x3"):
        plan = passes.plan_pass(f32, f32, pending, pending and f32, steps)
        combination = passes.plan_combine(f32, f32, steps)
        assert passes.plan_pass(f64, f64, pending, pending and f64, steps).constants["PRECISION"] == "ieee"
    names = [
        "base",
        "square_norms",
        "keys",
        "scores",
        *(["target", "kept", "weights", "pending_keys"] if pending else []),
    ]
    resources = compiled(passes.memory_pass, plan, dict.fromkeys(names, "*fp32"), arch)
    check(resources, arch, f"sm_{arch} pass tf32x3 pending {pending} keys {steps}", tf32=True)
    types = dict.fromkeys(("base", "weights", "parts"), "*fp32")
    resources = compiled(passes.combine_pass, combination, types, arch)
    check(resources, arch, f"sm_{arch} combine tf32x3 {steps}", tf32=True)


@pytest.mark.parametrize("keys, tile", [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (65, 128), (128, 128)])
def test_keys_are_padded_to_the_least_tile_that_holds_them(keys: int, tile: int):
    from dan_fast.triton_kernels import passes

    assert passes.plan_pass(f32, f32, None, None, keys).constants["BLOCK_T"] == tile
    assert passes.plan_combine(f32, f32, keys).constants["BLOCK_T"] == min(tile, 64)
    held = passes.plan_pass(f32, f32, keys, f32, keys).constants
    assert held["HELD_BLOCKS"] * held["BLOCK_P"] == tile
