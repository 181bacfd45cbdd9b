// Arguments and results of torch.ops.dan_fast.head_*: checked, and as csrc/attention/head.h wants them,
// whichever device's kernel is to read them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <tuple>

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
  STD_TORCH_CHECK(features.size(1) < int64_t{1} << 31 && features.size(2) * features.size(3) < int64_t{1} << 31,
                  "features must have less than 2^31 channels and positions");
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

struct PoolArguments : Features {
  explicit PoolArguments(const Tensor& features_)
      : Features(features_), mean(empty({batch, channels})), peak(empty({batch, channels})),
        peak_position(indices(channels)) {}

  template <typename A>
  dan_fast::Pooled<A> out() {
    return {data<A>(mean), data<A>(peak), data<int32_t>(peak_position)};
  }

  Tensor mean, peak, peak_position;
};

struct AttendArguments : Features {
  AttendArguments(const Tensor& features_, const Tensor& channel_attention_, const Tensor& rows_,
                  const Tensor& labels_, const Tensor& ws1_, const Tensor& ws3_, const Tensor& ws2_,
                  const Tensor& ws4_)
      : Features(features_), channel_attention(by_channel("channel_attention", channel_attention_)),
        rows(by_channel("rows", rows_)), labels(fit("labels", labels_, "(B,)", {batch}, ScalarType::Long)),
        hidden(ws1_.dim() == 2 ? ws1_.size(0) : 0),
        ws1(fit("ws1", ws1_, "(h, H W)", {hidden, positions}, statistics)),
        ws3(fit("ws3", ws3_, "(h, H W)", {hidden, positions}, statistics)),
        ws2(fit("ws2", ws2_, "(H W, h)", {positions, hidden}, statistics)),
        ws4(fit("ws4", ws4_, "(H W, h)", {positions, hidden}, statistics)) {}

  template <typename A>
  dan_fast::AttendInput<A> in() const {
    return {data<A>(channel_attention), data<A>(rows), data<int64_t>(labels),
            {hidden, data<A>(ws1), data<A>(ws3), data<A>(ws2), data<A>(ws4)}};
  }

  const Tensor channel_attention, rows, labels;
  const int64_t hidden;
  const Tensor ws1, ws3, ws2, ws4;
};

using AttendResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct AttendedTensors {
  explicit AttendedTensors(const Features& x)
      : attended(x.empty({x.batch, x.channels})), spatial_attention(x.empty({x.batch, x.positions})),
        loss(x.empty({x.batch})), mean_map(x.empty({x.batch, x.positions})),
        peak_map(x.empty({x.batch, x.positions})), peak_channel(x.indices(x.positions)),
        adversary_map(x.empty({x.batch, x.positions})) {}

  template <typename A>
  dan_fast::Attended<A> out() {
    return {data<A>(attended), data<A>(spatial_attention), data<A>(loss), data<A>(mean_map), data<A>(peak_map),
            data<int32_t>(peak_channel), data<A>(adversary_map)};
  }

  AttendResult result() const {
    return {attended, spatial_attention, loss, mean_map, peak_map, peak_channel, adversary_map};
  }

  Tensor attended, spatial_attention, loss, mean_map, peak_map, peak_channel, adversary_map;
};

using AttendGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct AttendBackwardArguments : AttendArguments {
  AttendBackwardArguments(
      const Tensor& features_, const Tensor& channel_attention_, const Tensor& rows_, const Tensor& labels_,
      const Tensor& ws1_, const Tensor& ws3_, const Tensor& ws2_, const Tensor& ws4_, const Tensor& attended_,
      const Tensor& spatial_attention_, const Tensor& mean_map_, const Tensor& peak_map_, const Tensor& peak_channel_,
      const Tensor& adversary_map_, const Tensor& grad_attended_, const Tensor& grad_spatial_attention_,
      const Tensor& grad_loss_)
      : AttendArguments(features_, channel_attention_, rows_, labels_, ws1_, ws3_, ws2_, ws4_),
        attended(by_channel("attended", attended_)),
        spatial_attention(by_position("spatial_attention", spatial_attention_)),
        mean_map(by_position("mean_map", mean_map_)), peak_map(by_position("peak_map", peak_map_)),
        peak_channel(fit("peak_channel", peak_channel_, "(B, H W)", {batch, positions}, ScalarType::Int)),
        adversary_map(by_position("adversary_map", adversary_map_)),
        grad_attended(by_channel("grad_attended", grad_attended_)),
        grad_spatial_attention(by_position("grad_spatial_attention", grad_spatial_attention_)),
        grad_loss(fit("grad_loss", grad_loss_, "(B,)", {batch}, statistics)),
        by_channel_attention(empty({batch, channels})), by_rows(empty({batch, channels})),
        by_mean_map(empty({batch, positions})), by_peak_map(empty({batch, positions})),
        by_adversary_map(empty({batch, positions})), by_ws1(empty({hidden, positions})),
        by_ws3(empty({hidden, positions})), by_ws2(empty({positions, hidden})), by_ws4(empty({positions, hidden})) {}

  template <typename A>
  dan_fast::Saved<A> saved() const {
    return {data<A>(attended), data<A>(spatial_attention), data<A>(mean_map), data<A>(peak_map),
            data<int32_t>(peak_channel), data<A>(adversary_map)};
  }

  template <typename A>
  dan_fast::AttendedGrad<A> grad() const {
    return {data<A>(grad_attended), data<A>(grad_spatial_attention), data<A>(grad_loss)};
  }

  template <typename A>
  dan_fast::AttendInputGrad<A> out() {
    return {data<A>(by_channel_attention), data<A>(by_rows), data<A>(by_mean_map), data<A>(by_peak_map),
            data<A>(by_adversary_map), data<A>(by_ws1), data<A>(by_ws3), data<A>(by_ws2), data<A>(by_ws4)};
  }

  AttendGradients result() const {
    return {by_channel_attention, by_rows, by_mean_map, by_peak_map, by_adversary_map, by_ws1, by_ws3, by_ws2, by_ws4};
  }

  const Tensor attended, spatial_attention, mean_map, peak_map, peak_channel, adversary_map;
  const Tensor grad_attended, grad_spatial_attention, grad_loss;
  Tensor by_channel_attention, by_rows, by_mean_map, by_peak_map, by_adversary_map, by_ws1, by_ws3, by_ws2, by_ws4;
};

// `grad_` is torch.empty_like(features).
struct FeaturesBackwardArguments : Features {
  FeaturesBackwardArguments(
      const Tensor& grad_, const Tensor& channel_attention_, const Tensor& rows_, const Tensor& spatial_attention_,
      const Tensor& peak_channel_, const Tensor& peak_position_, const Tensor& grad_attended_,
      const Tensor& grad_mean_map_, const Tensor& grad_peak_map_, const Tensor& grad_adversary_map_,
      const Tensor& grad_mean_, const Tensor& grad_peak_)
      : Features(grad_),
        channel_attention(by_channel("channel_attention", channel_attention_)), rows(by_channel("rows", rows_)),
        spatial_attention(by_position("spatial_attention", spatial_attention_)),
        peak_channel(fit("peak_channel", peak_channel_, "(B, H W)", {batch, positions}, ScalarType::Int)),
        peak_position(fit("peak_position", peak_position_, "(B, C)", {batch, channels}, ScalarType::Int)),
        grad_attended(by_channel("grad_attended", grad_attended_)),
        grad_mean_map(by_position("grad_mean_map", grad_mean_map_)),
        grad_peak_map(by_position("grad_peak_map", grad_peak_map_)),
        grad_adversary_map(by_position("grad_adversary_map", grad_adversary_map_)),
        grad_mean(by_channel("grad_mean", grad_mean_)), grad_peak(by_channel("grad_peak", grad_peak_)) {}

  template <typename A>
  dan_fast::FeaturesGradInput<A> in() const {
    return {data<A>(channel_attention), data<A>(rows), data<A>(spatial_attention), data<int32_t>(peak_channel),
            data<int32_t>(peak_position), data<A>(grad_attended), data<A>(grad_mean_map), data<A>(grad_peak_map),
            data<A>(grad_adversary_map), data<A>(grad_mean), data<A>(grad_peak)};
  }

  template <typename S>
  dan_fast::FeatureMap<S> out() const {
    return layout.map(static_cast<S*>(features.mutable_data_ptr()));
  }

  // Where no kernel writes these strides, what was written is copied.
  Tensor result(Tensor grad) const {
    return features.const_data_ptr() == grad.const_data_ptr() ? grad : torch::stable::copy_(grad, features);
  }

  const Tensor channel_attention, rows, spatial_attention, peak_channel, peak_position;
  const Tensor grad_attended, grad_mean_map, grad_peak_map, grad_adversary_map, grad_mean, grad_peak;
};

}  // namespace dan_fast::head
