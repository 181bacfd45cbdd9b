// torch.ops.dan_fast.head_*: the passes of the attention head over the last feature map. Checks, output tensors, and
// which kernel serves which device; csrc/attention/head.h says what is computed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>

#include "../csrc/attention/head_cpu.h"
#include "tensors.h"

#ifdef DAN_FAST_CUDA
#include "../csrc/attention/head_launch.h"
#include "cuda_call.h"
#endif

namespace {

using dan_fast::BFloat16;
using dan_fast::checked;
using dan_fast::data;
using dan_fast::Float16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Fewer elements of the map than these a thread are not worth waking one.
constexpr int64_t kElementsPerTask = 1 << 16;

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
  dan_fast::FeatureMap<S> map(S* data) const {
    return {data, batch, channels, positions, sample_stride, channel_stride, position_stride};
  }

  int64_t batch, channels, positions, sample_stride, channel_stride, position_stride;
  bool readable;
};

Tensor readable_map(const Tensor& features) {
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

void check_peak_channel(const Tensor& peak_channel, int64_t channels) {
  const int32_t* begin = data<int32_t>(peak_channel);
  const bool fits = std::all_of(begin, begin + peak_channel.numel(), [=](int64_t c) { return c >= 0 && c < channels; });
  STD_TORCH_CHECK(fits, "peak_channel must be what head_attend gave, channels in [0, ", channels, ")");
}

// kernel(first, last) for ranges of samples.
template <typename Kernel>
void for_samples(const Features& x, const Kernel& kernel) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (x.channels * x.positions));
  torch::stable::parallel_for(0, x.batch, grain, kernel);
}

std::tuple<Tensor, Tensor, Tensor> head_pool_cpu(const Tensor& features) {
  PoolArguments args(features);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(head_pool<S, A>);
    const auto map = args.map<S>();
    const auto out = args.out<A>();
    for_samples(args, [&](int64_t first, int64_t last) { kernel(map, out, first, last); });
  });
  return {args.mean, args.peak, args.peak_position};
}

AttendResult head_attend_cpu(
    const Tensor& features, const Tensor& channel_attention, const Tensor& rows, const Tensor& labels,
    const Tensor& ws1, const Tensor& ws3, const Tensor& ws2, const Tensor& ws4) {
  const AttendArguments args(features, channel_attention, rows, labels, ws1, ws3, ws2, ws4);
  AttendedTensors tensors(args);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(head_attend<S, A>);
    const auto map = args.map<S>();
    const auto in = args.in<A>();
    const auto out = tensors.out<A>();
    for_samples(args, [&](int64_t first, int64_t last) { kernel(map, in, out, first, last); });
  });
  return tensors.result();
}

AttendGradients head_attend_backward_cpu(
    const Tensor& features, const Tensor& channel_attention, const Tensor& rows, const Tensor& labels,
    const Tensor& ws1, const Tensor& ws3, const Tensor& ws2, const Tensor& ws4, const Tensor& attended,
    const Tensor& spatial_attention, const Tensor& mean_map, const Tensor& peak_map, const Tensor& peak_channel,
    const Tensor& adversary_map, const Tensor& grad_attended, const Tensor& grad_spatial_attention,
    const Tensor& grad_loss) {
  AttendBackwardArguments args(
      features, channel_attention, rows, labels, ws1, ws3, ws2, ws4, attended, spatial_attention, mean_map, peak_map,
      peak_channel, adversary_map, grad_attended, grad_spatial_attention, grad_loss);
  check_peak_channel(args.peak_channel, args.channels);
  Tensor gates = args.empty({args.batch, 3, args.positions}), units = args.empty({args.batch, 6, args.hidden});
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(head_attend_backward<S, A>);
    const auto map = args.map<S>();
    const auto in = args.in<A>();
    const auto saved = args.saved<A>();
    const auto grad = args.grad<A>();
    const auto out = args.out<A>();
    const dan_fast::SpatialGradients<A> parts = {data<A>(gates), data<A>(units)};
    for_samples(args, [&](int64_t first, int64_t last) { kernel(map, in, saved, grad, out, parts, first, last); });
    const auto add_up = DAN_FAST_KERNEL(head_weights_backward<A>);
    const int64_t batch = args.batch, positions = args.positions, hidden = args.hidden;
    const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (6 * (batch + 1) * (hidden + 1)));
    torch::stable::parallel_for(0, positions, grain, [&](int64_t first, int64_t last) {
      add_up(saved, parts, batch, positions, hidden, out, first, last);
    });
  });
  return args.result();
}

Tensor head_features_backward_cpu(
    const Tensor& features, const Tensor& channel_attention, const Tensor& rows, const Tensor& spatial_attention,
    const Tensor& peak_channel, const Tensor& peak_position, const Tensor& grad_attended, const Tensor& grad_mean_map,
    const Tensor& grad_peak_map, const Tensor& grad_adversary_map, const Tensor& grad_mean, const Tensor& grad_peak) {
  const Tensor grad = torch::stable::empty_like(features);
  const FeaturesBackwardArguments args(
      grad, channel_attention, rows, spatial_attention, peak_channel, peak_position, grad_attended, grad_mean_map,
      grad_peak_map, grad_adversary_map, grad_mean, grad_peak);
  check_peak_channel(args.peak_channel, args.channels);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(head_features_backward<S, A>);
    const auto out = args.out<S>();
    const auto in = args.in<A>();
    for_samples(args, [&](int64_t first, int64_t last) { kernel(out, in, first, last); });
  });
  return args.result(grad);
}

#ifdef DAN_FAST_CUDA

dan_fast::AnyFeatureMap any_map(const Features& x, void* data) {
  using dan_fast::Scalar;
  const Layout& at = x.layout;
  const ScalarType type = x.features.scalar_type();
  const Scalar scalar = type == ScalarType::Double     ? Scalar::kFloat64
                        : type == ScalarType::Float    ? Scalar::kFloat32
                        : type == ScalarType::BFloat16 ? Scalar::kBFloat16
                                                       : Scalar::kFloat16;
  return {scalar,           data, at.batch, at.channels, at.positions, at.sample_stride, at.channel_stride,
          at.position_stride};
}

dan_fast::AnyFeatureMap read_map(const Features& x) {
  return any_map(x, const_cast<void*>(x.features.const_data_ptr()));
}

// launch(A{}, stream) for the type of statistics, on the device of the map.
template <typename Launch>
void on_cuda(const Features& x, const char* what, const Launch& launch) {
  dan_fast::on_device_of(x.features, what, [&](void* stream) {
    return x.statistics == ScalarType::Double ? launch(double{}, stream) : launch(float{}, stream);
  });
}

// launch(A{}, workspace, stream)
template <typename Launch>
void on_cuda_with_workspace(const AttendArguments& args, const char* what, const Launch& launch) {
  on_cuda(args, what, [&](auto zero, void* stream) {
    int64_t bytes = 0;
    const int status = dan_fast::head_workspace_bytes(read_map(args), args.hidden, &bytes);
    if (status != 0) return status;
    // Back to PyTorch's allocator when this returns, for what is queued on this stream later.
    const Tensor workspace = torch::stable::new_empty(args.features, {bytes}, ScalarType::Byte);
    return launch(zero, workspace.mutable_data_ptr(), stream);
  });
}

std::tuple<Tensor, Tensor, Tensor> head_pool_cuda(const Tensor& features) {
  PoolArguments args(features);
  on_cuda(args, "head_pool", [&](auto zero, void* stream) {
    return dan_fast::launch_head_pool(read_map(args), args.out<decltype(zero)>(), stream);
  });
  return {args.mean, args.peak, args.peak_position};
}

AttendResult head_attend_cuda(
    const Tensor& features, const Tensor& channel_attention, const Tensor& rows, const Tensor& labels,
    const Tensor& ws1, const Tensor& ws3, const Tensor& ws2, const Tensor& ws4) {
  const AttendArguments args(features, channel_attention, rows, labels, ws1, ws3, ws2, ws4);
  AttendedTensors tensors(args);
  on_cuda_with_workspace(args, "head_attend", [&](auto zero, void* workspace, void* stream) {
    using A = decltype(zero);
    return dan_fast::launch_head_attend(read_map(args), args.in<A>(), tensors.out<A>(), workspace, stream);
  });
  return tensors.result();
}

AttendGradients head_attend_backward_cuda(
    const Tensor& features, const Tensor& channel_attention, const Tensor& rows, const Tensor& labels,
    const Tensor& ws1, const Tensor& ws3, const Tensor& ws2, const Tensor& ws4, const Tensor& attended,
    const Tensor& spatial_attention, const Tensor& mean_map, const Tensor& peak_map, const Tensor& peak_channel,
    const Tensor& adversary_map, const Tensor& grad_attended, const Tensor& grad_spatial_attention,
    const Tensor& grad_loss) {
  AttendBackwardArguments args(
      features, channel_attention, rows, labels, ws1, ws3, ws2, ws4, attended, spatial_attention, mean_map, peak_map,
      peak_channel, adversary_map, grad_attended, grad_spatial_attention, grad_loss);
  on_cuda_with_workspace(args, "head_attend_backward", [&](auto zero, void* workspace, void* stream) {
    using A = decltype(zero);
    return dan_fast::launch_head_attend_backward(
        read_map(args), args.in<A>(), args.saved<A>(), args.grad<A>(), args.out<A>(), workspace, stream);
  });
  return args.result();
}

Tensor head_features_backward_cuda(
    const Tensor& features, const Tensor& channel_attention, const Tensor& rows, const Tensor& spatial_attention,
    const Tensor& peak_channel, const Tensor& peak_position, const Tensor& grad_attended, const Tensor& grad_mean_map,
    const Tensor& grad_peak_map, const Tensor& grad_adversary_map, const Tensor& grad_mean, const Tensor& grad_peak) {
  const Tensor grad = torch::stable::empty_like(features);
  const FeaturesBackwardArguments args(
      grad, channel_attention, rows, spatial_attention, peak_channel, peak_position, grad_attended, grad_mean_map,
      grad_peak_map, grad_adversary_map, grad_mean, grad_peak);
  on_cuda(args, "head_features_backward", [&](auto zero, void* stream) {
    const auto map = any_map(args, args.features.mutable_data_ptr());
    return dan_fast::launch_head_features_backward(map, args.in<decltype(zero)>(), stream);
  });
  return args.result(grad);
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dan_fast, m) {
  m.def("head_pool(Tensor features) -> (Tensor mean, Tensor peak, Tensor peak_position)");
  m.def(
      "head_attend(Tensor features, Tensor channel_attention, Tensor rows, Tensor labels, Tensor ws1, Tensor ws3, "
      "Tensor ws2, Tensor ws4) -> (Tensor attended, Tensor spatial_attention, Tensor loss, Tensor mean_map, Tensor "
      "peak_map, Tensor peak_channel, Tensor adversary_map)");
  m.def(
      "head_attend_backward(Tensor features, Tensor channel_attention, Tensor rows, Tensor labels, Tensor ws1, Tensor "
      "ws3, Tensor ws2, Tensor ws4, Tensor attended, Tensor spatial_attention, Tensor mean_map, Tensor peak_map, "
      "Tensor peak_channel, Tensor adversary_map, Tensor grad_attended, Tensor grad_spatial_attention, Tensor "
      "grad_loss) -> (Tensor channel_attention, Tensor rows, Tensor mean_map, Tensor peak_map, Tensor adversary_map, "
      "Tensor ws1, Tensor ws3, Tensor ws2, Tensor ws4)");
  m.def(
      "head_features_backward(Tensor features, Tensor channel_attention, Tensor rows, Tensor spatial_attention, Tensor "
      "peak_channel, Tensor peak_position, Tensor grad_attended, Tensor grad_mean_map, Tensor grad_peak_map, Tensor "
      "grad_adversary_map, Tensor grad_mean, Tensor grad_peak) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) {
  m.impl("head_pool", TORCH_BOX(&head_pool_cpu));
  m.impl("head_attend", TORCH_BOX(&head_attend_cpu));
  m.impl("head_attend_backward", TORCH_BOX(&head_attend_backward_cpu));
  m.impl("head_features_backward", TORCH_BOX(&head_features_backward_cpu));
}

#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) {
  m.impl("head_pool", TORCH_BOX(&head_pool_cuda));
  m.impl("head_attend", TORCH_BOX(&head_attend_cuda));
  m.impl("head_attend_backward", TORCH_BOX(&head_attend_backward_cuda));
  m.impl("head_features_backward", TORCH_BOX(&head_features_backward_cuda));
}
#endif
