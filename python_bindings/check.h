// What the arguments of an operator must be: checked, named where they do not fit, and contiguous.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <string>
#include <type_traits>

namespace dan_fast {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType dtype) {
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

inline bool has_sizes(const Tensor& tensor, Sizes sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t dim = 0; same && dim < tensor.dim(); ++dim) same = tensor.size(dim) == sizes[static_cast<size_t>(dim)];
  return same;
}

inline std::string listed(Sizes sizes) {
  std::string list;
  for (const int64_t size : sizes) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return list;
}

inline bool on_one_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Contiguous, of this shape and dtype, where `like` is; `shape` names the sizes as the documentation does.
inline Tensor checked(
    const char* name, const Tensor& tensor, const char* shape, Sizes sizes, ScalarType dtype, const Tensor& like,
    const char* like_name) {
  STD_TORCH_CHECK(has_sizes(tensor, sizes), name, " must be ", shape, " = (", listed(sizes), "), got (",
                  listed(tensor.sizes()), ")");
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, name, " must be ", dtype_name(dtype), ", got ", dtype_name(tensor.scalar_type()));
  STD_TORCH_CHECK(on_one_device(tensor, like), name, " must be on the device of ", like_name);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A matrix with adjacent columns; rows may lie further apart than they are long, as those of a padded memory do.
inline Tensor with_adjacent_columns(const Tensor& matrix) {
  return matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

// The elements; of a const T where they are only read.
template <typename T>
T* data(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

}  // namespace dan_fast
