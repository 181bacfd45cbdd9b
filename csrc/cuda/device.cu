#include "device.h"

#include <cuda_runtime.h>

namespace dan_fast {
namespace {

// Compiled for the same architectures as all others.
__global__ void any_kernel() {}

}  // namespace

const char* why_kernels_cannot_run(int device) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, any_kernel);
    cudaSetDevice(before);
  }
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next launch would report the error of this question
  return cudaGetErrorString(status);
}

}  // namespace dan_fast
