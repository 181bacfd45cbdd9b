// Arguments of an operator: checked, named where they do not fit, and contiguous.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <string>

namespace dan_fast {

inline std::string dtype_name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// Contiguous, of this shape and dtype, where `like` is; `shape` names the sizes as the documentation does.
inline torch::stable::Tensor checked(
    const char* name, const torch::stable::Tensor& tensor, const char* shape, std::initializer_list<int64_t> sizes,
    torch::headeronly::ScalarType dtype, const torch::stable::Tensor& like, const char* like_name) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  std::string expected, got;
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    fits = fits && tensor.size(dim++) == size;
    expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  }
  for (dim = 0; dim < tensor.dim(); ++dim) got += (dim == 0 ? "" : ", ") + std::to_string(tensor.size(dim));
  STD_TORCH_CHECK(fits, name, " must be ", shape, " = (", expected, "), got (", got, ")");
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, name, " must be ", dtype_name(dtype), ", got ", dtype_name(tensor.scalar_type()));
  STD_TORCH_CHECK(
      tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
      " must be on the device of ", like_name);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
const T* data(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* data(torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace dan_fast
