// The schemas of torch.ops.dan_fast and which kernel serves which device. Only PyTorch's stable ABI is used, so
// that one binary serves every PyTorch >= 2.11.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <string>

#include "../csrc/memory/row_norms.h"

#ifdef DAN_FAST_CUDA
#include "../csrc/memory/row_norms_launch.h"
#include "cuda_call.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (s, d) with adjacent columns; rows may lie further apart than d, as those of a padded memory do.
Tensor with_adjacent_columns(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 2, "features must be (s, d), got ", features.dim(), " dimensions");
  return features.stride(1) == 1 ? features : torch::stable::contiguous(features);
}

Tensor empty_norms(const Tensor& features) {
  const bool wide = features.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(features, {features.size(0)}, wide ? ScalarType::Double : ScalarType::Float);
}

template <typename In, typename Out>
void fill_on_cpu(const Tensor& features, Tensor& norms) {
  constexpr int64_t kElementsPerTask = 1 << 15;
  const In* in = static_cast<const In*>(features.const_data_ptr());
  Out* out = static_cast<Out*>(norms.mutable_data_ptr());
  const int64_t columns = features.size(1);
  const int64_t row_stride = features.stride(0);
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, features.size(0), grain, [=](int64_t first, int64_t last) {
    dan_fast::row_sq_norms(in, row_stride, columns, first, last, out);
  });
}

Tensor row_sq_norms_cpu(const Tensor& features) {
  const Tensor rows = with_adjacent_columns(features);
  Tensor norms = empty_norms(rows);
  switch (rows.scalar_type()) {
    case ScalarType::Double:
      fill_on_cpu<double, double>(rows, norms);
      break;
    case ScalarType::Float:
      fill_on_cpu<float, float>(rows, norms);
      break;
    case ScalarType::Half:
      fill_on_cpu<torch::headeronly::Half, float>(rows, norms);
      break;
    case ScalarType::BFloat16:
      fill_on_cpu<torch::headeronly::BFloat16, float>(rows, norms);
      break;
    default:
      STD_TORCH_CHECK(false, "features must be float64, float32, float16 or bfloat16");
  }
  return norms;
}

#ifdef DAN_FAST_CUDA

Tensor row_sq_norms_cuda(const Tensor& features) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor rows = with_adjacent_columns(features);
  Tensor norms = empty_norms(rows);
  dan_fast::on_device_of(rows, "row_sq_norms", [&](void* stream) {
    return dan_fast::launch_row_sq_norms(
        dan_fast::scalar_of(rows), rows.const_data_ptr(), rows.stride(0), rows.size(0), rows.size(1), norms.mutable_data_ptr(),
        stream);
  });
  return norms;
}

// Empty if the kernels run on this device.
std::string cuda_problem(int64_t device) {
  const char* reason = dan_fast::why_kernels_cannot_run(static_cast<int>(device));
  return reason == nullptr ? "" : reason;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY(dan_fast, m) {
  m.def("row_sq_norms(Tensor features) -> Tensor");
#ifdef DAN_FAST_CUDA
  m.def("cuda_problem(int device) -> str");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) {
  m.impl("row_sq_norms", TORCH_BOX(&row_sq_norms_cpu));
}

#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) {
  m.impl("row_sq_norms", TORCH_BOX(&row_sq_norms_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_problem", TORCH_BOX(&cuda_problem));
}
#endif
