// Feature maps and what belongs to them as arguments of operators: checked, and as csrc/attention/head.h wants them,
// whichever device's kernel is to read them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>

#include "../csrc/attention/head_cpu.h"
#include "tensors.h"

namespace dan_fast::head {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (B, C, H, W) with positions, or channels, adjacent: as the kernels read it.
struct Layout {
  explicit Layout(const Tensor& map)
      : batch(map.size(0)), channels(map.size(1)), positions(map.size(2) * map.size(3)), sample_stride(map.stride(0)),
        channel_stride(map.stride(1)), position_stride(map.size(3) == 1 ? map.stride(2) : map.stride(3)) {
    const bool even = map.size(2) == 1 || map.size(3) == 1 || map.stride(2) == map.size(3) * map.stride(3);
    if (positions == 1) position_stride = 1;
    readable = even && (position_stride == 1 || (channel_stride == 1 && channels > 1));
  }

  // Whether a readable map lies in memory without gaps and no two elements share theirs.
  bool dense() const {
    const bool in_sample = position_stride == 1 ? channels == 1 || channel_stride == positions
                                                : position_stride == channels;
    return in_sample && sample_stride == channels * positions;
  }

  template <typename S>
  dan_fast::FeatureMap<S> map(S* data) const {
    return {data, batch, channels, positions, sample_stride, channel_stride, position_stride};
  }

  int64_t batch, channels, positions, sample_stride, channel_stride, position_stride;
  bool readable;
};

inline Tensor readable_map(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 4, "features must be (B, C, H, W), got ", features.dim(), " dimensions");
  STD_TORCH_CHECK(features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0,
                  "features must have at least one channel and one position");
  STD_TORCH_CHECK(features.size(1) < int64_t{1} << 30 && features.size(2) * features.size(3) < int64_t{1} << 24,
                  "features must have less than 2^30 channels and 2^24 positions");
  const ScalarType type = features.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "features must be float64, float32, bfloat16 or float16, got ", dan_fast::dtype_name(type));
  return Layout(features).readable ? features : torch::stable::contiguous(features);
}

// A map, its layout and the dtype of what is computed from it.
struct Features {
  explicit Features(const Tensor& features_)
      : features(readable_map(features_)), layout(features), batch(layout.batch), channels(layout.channels),
        positions(layout.positions),
        statistics(features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {}

  Tensor empty(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_empty(features, sizes, statistics);
  }

  Tensor indices(int64_t size) const { return torch::stable::new_empty(features, {batch, size}, ScalarType::Int); }

  Tensor fit(const char* name, const Tensor& tensor, const char* shape, std::initializer_list<int64_t> sizes,
             ScalarType dtype) const {
    return checked(name, tensor, shape, sizes, dtype, features, "features");
  }
  Tensor by_channel(const char* name, const Tensor& tensor) const {
    return fit(name, tensor, "(B, C)", {batch, channels}, statistics);
  }
  Tensor by_position(const char* name, const Tensor& tensor) const {
    return fit(name, tensor, "(B, H W)", {batch, positions}, statistics);
  }

  template <typename S>
  dan_fast::FeatureMap<const S> map() const {
    return layout.map(data<S>(features));
  }

  // function(S{}, A{}) for the types of the map and of its statistics.
  template <typename Function>
  void for_types(const Function& function) const {
    switch (features.scalar_type()) {
      case ScalarType::Double:
        return function(double{}, double{});
      case ScalarType::Float:
        return function(float{}, float{});
      case ScalarType::BFloat16:
        return function(BFloat16{}, float{});
      default:
        return function(Float16{}, float{});
    }
  }

  const Tensor features;
  const Layout layout;
  const int64_t batch, channels, positions;
  const ScalarType statistics;
};

}  // namespace dan_fast::head
