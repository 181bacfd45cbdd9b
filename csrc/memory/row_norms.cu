#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>

#include "row_norms.cuh"
#include "row_norms_launch.h"

namespace dan_fast {
namespace {

constexpr int kThreads = 256;

template <typename In, typename Out>
cudaError_t launch(
    const void* features, int64_t row_stride, int64_t rows, int64_t columns, void* norms, void* stream) {
  constexpr int64_t kRows = kThreads / kWarp;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  row_sq_norms_kernel<In, Out><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const In*>(features), row_stride, rows, columns, static_cast<Out*>(norms));
  return cudaGetLastError();
}

}  // namespace

int launch_row_sq_norms(
    Scalar scalar,
    const void* features,
    int64_t row_stride,
    int64_t rows,
    int64_t columns,
    void* norms,
    void* stream) {
  switch (scalar) {
    case Scalar::kFloat64:
      return launch<double, double>(features, row_stride, rows, columns, norms, stream);
    case Scalar::kFloat32:
      return launch<float, float>(features, row_stride, rows, columns, norms, stream);
    case Scalar::kFloat16:
      return launch<__half, float>(features, row_stride, rows, columns, norms, stream);
    case Scalar::kBFloat16:
      return launch<__nv_bfloat16, float>(features, row_stride, rows, columns, norms, stream);
  }
  return cudaErrorInvalidValue;
}

const char* why_kernels_cannot_run(int device) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, row_sq_norms_kernel<float, float>);
    cudaSetDevice(before);
  }
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the failed question would surface as the error of the next launch
  return cudaGetErrorString(status);
}

}  // namespace dan_fast
