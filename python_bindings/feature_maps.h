// Feature maps as arguments of operators: checked, and as csrc/attention/head.h takes them on every device.
#pragma once

#include "../csrc/attention/head.h"
#include "dispatch.h"

namespace dan_fast {

// (B, C, H, W) with positions, or channels, adjacent: as the kernels read it.
struct Layout {
  explicit Layout(const Tensor& map)
      : batch(map.size(0)), channels(map.size(1)), positions(map.size(2) * map.size(3)), sample_stride(map.stride(0)),
        channel_stride(map.stride(1)), position_stride(map.size(3) == 1 ? map.stride(2) : map.stride(3)) {
    const bool even = map.size(2) == 1 || map.size(3) == 1 || map.stride(2) == map.size(3) * map.stride(3);
    if (positions == 1) position_stride = 1;
    readable = even && (position_stride == 1 || (channel_stride == 1 && channels > 1));
  }

  template <typename S>
  FeatureMap<S> map(S* elements) const {
    return {elements, batch, channels, positions, sample_stride, channel_stride, position_stride};
  }

  int64_t batch, channels, positions, sample_stride, channel_stride, position_stride;
  bool readable;
};

// A readable map, of a const S where it is only read.
template <typename S>
FeatureMap<S> map_of(const Tensor& map) {
  return Layout(map).map(data<S>(map));
}

inline Tensor readable_map(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 4, "features must be (B, C, H, W), got ", features.dim(), " dimensions");
  STD_TORCH_CHECK(features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0,
                  "features must have at least one channel and one position");
  STD_TORCH_CHECK(features.size(1) < int64_t{1} << 30 && features.size(2) * features.size(3) < int64_t{1} << 24,
                  "features must have less than 2^30 channels and 2^24 positions");
  check_storage("features", features);
  if (Layout(features).readable) return features;
  // Without images any strides count as contiguous, which would leave them as they are.
  if (features.size(0) == 0) return torch::stable::new_empty(features, features.sizes());
  return torch::stable::contiguous(features);
}

// A map, its layout and the dtype of what is computed from it.
struct Features {
  explicit Features(const Tensor& features_)
      : features(readable_map(features_)), layout(features), batch(layout.batch), channels(layout.channels),
        positions(layout.positions), statistics(statistics_of(features)) {}

  Tensor empty(Sizes sizes) const { return torch::stable::new_empty(features, sizes, statistics); }
  Tensor indices(int64_t size) const { return torch::stable::new_empty(features, {batch, size}, ScalarType::Int); }

  Tensor fit(const char* name, const Tensor& tensor, const char* shape, Sizes sizes, ScalarType dtype) const {
    return checked(name, tensor, shape, sizes, dtype, features, "features");
  }
  Tensor by_channel(const char* name, const Tensor& tensor) const {
    return fit(name, tensor, "(B, C)", {batch, channels}, statistics);
  }
  Tensor by_position(const char* name, const Tensor& tensor) const {
    return fit(name, tensor, "(B, H W)", {batch, positions}, statistics);
  }
  Tensor by_sample(const char* name, const Tensor& tensor, ScalarType dtype) const {
    return fit(name, tensor, "(B,)", {batch}, dtype);
  }

  const Tensor features;
  const Layout layout;
  const int64_t batch, channels, positions;
  const ScalarType statistics;
};

// A map to write. Its own, `features`, is the result, or memory for it where kernels cannot write these strides.
struct Written : Features {
  explicit Written(const Tensor& wanted_) : Features(wanted_), wanted(wanted_) {}

  // `map`, or a copy of it, with the numbers adjacent that are in the written map.
  Tensor alike(const Tensor& map) const {
    const Layout other(map);
    const bool same = layout.position_stride == 1 ? other.position_stride == 1 : other.channel_stride == 1;
    if (other.readable && same) return map;
    Tensor copy = torch::stable::empty_like(features);
    return torch::stable::copy_(copy, map);
  }

  Tensor result() const {
    if (features.const_data_ptr() == wanted.const_data_ptr()) return wanted;
    Tensor copy = wanted;
    return torch::stable::copy_(copy, features);
  }

  const Tensor wanted;
};

}  // namespace dan_fast
