"""A refused CUDA call leaves nothing behind for the next launch to report."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support import ROOT
from tests.support.nvcc import NVCC, needs_nvcc
from tests.support.toolchain import COMPILER, needs_compiler

# Of the runtime, what cooperative.cuh calls: call number `refused` fails, and an error is kept until it is asked for.
FAKE_RUNTIME = r"""
#pragma once
#include <cstddef>
enum cudaError_t { cudaSuccess = 0, cudaErrorRefused = 1, cudaErrorCooperativeLaunchTooLarge = 720 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;
inline int refused = 0, calls = 0;
inline cudaError_t last = cudaSuccess;
inline cudaError_t next() {
  if (++calls != refused) return cudaSuccess;
  return last = cudaErrorRefused;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t result = last;
  last = cudaSuccess;
  return result;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, next(); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, next(); }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  return *count = 3, next();
}
inline cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return next(); }
inline cudaError_t cudaLaunchCooperativeKernel(const void*, unsigned, unsigned, void**, size_t, cudaStream_t) {
  return next();
}
"""
ON_HOST = r"""
#include "csrc/cuda/cooperative.cuh"

int main() {
  int64_t blocks = 0;
  const auto launch = [&](dan_fast::ResidentBlocks& resident) {
    const cudaError_t status = resident.ask(nullptr, 32, 0, &blocks);
    return status ? status : dan_fast::launch_cooperative(nullptr, blocks, 32, 0, nullptr, nullptr, 4, nullptr);
  };
  for (refused = 1; refused <= 5; ++refused) {
    calls = 0;
    dan_fast::ResidentBlocks resident;
    if (launch(resident) != cudaErrorRefused || cudaGetLastError() != cudaSuccess) return refused;
    if (launch(resident) != cudaSuccess || blocks != 6) return 10 + refused;
  }
  // A device that has answered is not asked again: which it is, the clearing and the launch.
  calls = refused = 0;
  dan_fast::ResidentBlocks resident;
  return launch(resident) || calls != 5 || launch(resident) || calls != 8 ? 20 : 0;
}
"""
ON_GPU = r"""
#include "csrc/cuda/cooperative.cuh"

__global__ void nothing() {}

int main() {
  const void* const kernel = reinterpret_cast<const void*>(nothing);
  unsigned char* cleared = nullptr;
  if (cudaMalloc(&cleared, 4) != cudaSuccess) return 1;
  const auto refused = [&](int64_t blocks, void* clear) {
    return dan_fast::launch_cooperative(kernel, blocks, 32, 0, nullptr, clear, 4, nullptr) != cudaSuccess;
  };
  if (!refused(1 << 30, cleared) || cudaGetLastError() != cudaSuccess) return 2;
  if (!refused(1, nullptr) || cudaGetLastError() != cudaSuccess) return 3;
  nothing<<<1, 32>>>();
  return cudaGetLastError() == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess ? 0 : 4;
}
"""


@pytest.mark.compile
@needs_compiler
def test_a_refused_call_is_forgotten(tmp_path: Path):
    (tmp_path / "cuda_runtime.h").write_text(FAKE_RUNTIME)
    source, program = tmp_path / "refused.cpp", tmp_path / "refused"
    source.write_text(ON_HOST)
    subprocess.run([COMPILER, "-std=c++17", f"-I{tmp_path}", f"-I{ROOT}", source, "-o", program], check=True)
    assert subprocess.run([program]).returncode == 0


@pytest.mark.gpu
@pytest.mark.compile
@needs_nvcc
def test_a_launch_that_the_gpu_refused_is_forgotten(tmp_path: Path):
    source, program = tmp_path / "refused.cu", tmp_path / "refused"
    source.write_text(ON_GPU)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    command = [NVCC, "-std=c++17", f"-arch={arch}", "-cudart=static", f"-I{ROOT}", source, "-o", program]
    subprocess.run(command, check=True)
    assert subprocess.run([program]).returncode == 0


def test_no_other_call_can_leave_an_error():
    """Elsewhere kernels are launched, and cudaGetLastError both tells and clears."""
    calls = set()
    for path in (ROOT / "csrc").rglob("*.cu*"):
        if path.name != "cooperative.cuh":
            calls |= {(path.name, name) for name in re.findall(r"\b(cuda[A-Z]\w*)\(", path.read_text())}
    # `why_kernels_cannot_run` asks and clears.
    names = ("cudaFuncGetAttributes", "cudaGetErrorString")
    assert {call for call in calls if call[1] != "cudaGetLastError"} == {("device.cu", name) for name in names}
