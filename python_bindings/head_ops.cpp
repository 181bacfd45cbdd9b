// torch.ops.dan_fast.head_*: the passes of the attention head over the last feature map. Checks, output tensors, and
// which kernel serves which device; csrc/attention/head.h says what is computed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>

#include "head_arguments.h"

#ifdef DAN_FAST_CUDA
#include "../csrc/attention/head_launch.h"
#include "cuda_call.h"
#endif

namespace {

using namespace dan_fast::head;
using dan_fast::data;

// Fewer elements of the map than these a thread are not worth waking one.
constexpr int64_t kElementsPerTask = 1 << 16;

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
