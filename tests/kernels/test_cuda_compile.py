"""The CUDA kernels compiled ahead of time: none may spill registers or keep a stack in local memory."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.nvcc import KERNEL_RESOURCES as REPORT
from tests.support.nvcc import NVCC, needs_nvcc

pytestmark = [pytest.mark.compile, needs_nvcc]
ARCHS = ("8.6", "9.0")


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, str], list]:
    sources = REPORT["all_sources"]()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda source: REPORT["resources"](source, ARCHS, NVCC), sources))
    print("\n" + REPORT["table"](kernel for of_file in found for kernel in of_file))
    return {
        (source.name, arch): [kernel for kernel in of_file if kernel.arch == arch]
        for source, of_file in zip(sources, found, strict=True)
        for arch in ARCHS
    }


def test_every_file_has_kernels_for_every_architecture(kernels: dict[tuple[str, str], list]):
    assert {("scan_cuda_float.cu", arch) for arch in ARCHS} < set(kernels)
    for of_file in kernels.values():
        assert of_file and all(kernel.registers > 0 for kernel in of_file)
    for dtype in ("float", "double"):
        names = {kernel.name for kernel in kernels[f"scan_cuda_{dtype}.cu", "8.6"]}
        assert names == {f"scan_forward_kernel<{dtype}>", f"scan_backward_kernel<{dtype}>"}


def test_nothing_spills(kernels: dict[tuple[str, str], list]):
    worst = [kernel for of_file in kernels.values() for kernel in of_file if kernel.spilled or kernel.stack]
    assert not worst, "\n" + REPORT["table"](worst)


@pytest.mark.parametrize("at, field", [("(k * step) % 64", "stack"), ("k", "spilled")])
def test_a_stack_and_spills_are_seen(tmp_path: Path, at: str, field: str):
    source = tmp_path / "wide.cu"
    source.write_text(
        "__global__ void wide(float* x, int step) {\n"
        "  float own[SIZE];\n"
        "#pragma unroll\n"
        "  for (int k = 0; k < SIZE; ++k) own[k] = x[k * step];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        f"  for (int k = 0; k < SIZE; ++k) x[k] = own[{at}];\n"
        "}\n"
    )
    (kernel,) = REPORT["resources"](source, ["8.6"], NVCC, ["-maxrregcount=24", "-DSIZE=64"])
    assert kernel.name == "wide" and getattr(kernel, field) > 0


def test_what_does_not_compile_is_told(tmp_path: Path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { nonsense; }\n")
    with pytest.raises(RuntimeError, match="nonsense"):
        REPORT["resources"](source, ["8.6"], NVCC)
