// What the binding of a CUDA kernel needs of PyTorch: the current stream, the dtype, and errors of CUDA as exceptions.
#pragma once

#ifdef DAN_FAST_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#include "../csrc/memory/row_norms_launch.h"

// A CPU-only PyTorch lacks these; the binary must load there all the same.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace dan_fast {

// What a tensor is stored in, as launches tell types apart.
inline Scalar scalar_of(const torch::stable::Tensor& features) {
  using torch::headeronly::ScalarType;
  switch (features.scalar_type()) {
    case ScalarType::Double:
      return Scalar::kFloat64;
    case ScalarType::Float:
      return Scalar::kFloat32;
    case ScalarType::Half:
      return Scalar::kFloat16;
    case ScalarType::BFloat16:
      return Scalar::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "features must be float64, float32, float16 or bfloat16");
  }
}

// Calls `launch(stream)`, which returns a cudaError_t, on the device of `like` and its current stream.
template <typename Launch>
void on_device_of(const torch::stable::Tensor& like, const char* what, const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  char* message = nullptr;
  torch_c10_cuda_check_msg(launch(stream), __FILE__, what, __LINE__, true, &message);
  if (message == nullptr) return;
  const std::string copy(message);
  torch_c10_cuda_free_error_msg(message);
  STD_TORCH_CHECK(false, copy);
}

}  // namespace dan_fast
#endif
