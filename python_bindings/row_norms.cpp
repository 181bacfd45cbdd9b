// torch.ops.dan_fast.row_sq_norms, and whether a GPU runs the kernels of this library. Only PyTorch's stable ABI is
// used, so that one binary serves every PyTorch >= 2.11.
#include "../csrc/memory/row_norms.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "dispatch.h"

#ifdef DAN_FAST_CUDA
#include "../csrc/cuda/device.h"
#endif

namespace {

using dan_fast::data;
using dan_fast::Tensor;

// PyTorch's type of the same bits, which converts.
template <typename S>
struct Converting {
  using type = S;
};
template <>
struct Converting<dan_fast::BFloat16> {
  using type = torch::headeronly::BFloat16;
};
template <>
struct Converting<dan_fast::Float16> {
  using type = torch::headeronly::Half;
};

Tensor row_sq_norms(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 2, "features must be (s, d), got ", features.dim(), " dimensions");
  dan_fast::check_storage("features", features);
  const Tensor rows = dan_fast::with_adjacent_columns(features);
  const int64_t count = rows.size(0), columns = rows.size(1), row_stride = rows.stride(0);
  const Tensor norms = torch::stable::new_empty(rows, {count}, dan_fast::statistics_of(rows));
  dan_fast::for_storage(rows, [&](auto storage, auto zero) {
    using S = decltype(storage);
    auto* out = data<decltype(zero)>(norms);
    const auto on_cpu = [&] {
      constexpr int64_t kElementsPerTask = 1 << 15;
      const auto* in = data<const typename Converting<S>::type>(rows);
      const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, columns));
      torch::stable::parallel_for(0, count, grain, [=](int64_t first, int64_t last) {
        dan_fast::row_sq_norms(in, row_stride, columns, first, last, out);
      });
    };
    dan_fast::on_device_of(rows, "row_sq_norms", on_cpu, [&](auto stream) {
      return dan_fast::launch_row_sq_norms(data<const S>(rows), row_stride, count, columns, out, stream);
    });
  });
  return norms;
}

template <typename Library>
void implement(Library& m) {
  m.impl("row_sq_norms", TORCH_BOX(&row_sq_norms));
}

#ifdef DAN_FAST_CUDA
// Empty if the kernels run on this device.
std::string cuda_problem(int64_t device) {
  // PyTorch's guard: to set a device back by hand would make a context, of some hundred MB, on one that has none.
  const torch::stable::accelerator::DeviceGuard guard(static_cast<torch::stable::accelerator::DeviceIndex>(device));
  const char* reason = dan_fast::why_kernels_cannot_run();
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

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) { implement(m); }

#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) { implement(m); }

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_problem", TORCH_BOX(&cuda_problem));
}
#endif
