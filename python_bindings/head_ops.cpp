// torch.ops.dan_fast.attention_head, attention_head_backward: the whole attention head in one call each way, and which
// kernels serve which device; csrc/attention/head.h says what is computed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../csrc/attention/head_cpu_whole.h"
#include "head_arguments.h"
#include "kept_memory.h"

#ifdef DAN_FAST_CUDA
#include "../csrc/attention/head_launch.h"
#include "cuda_call.h"
#endif

namespace {

using namespace dan_fast::head;
using dan_fast::data;

struct Threads {
  template <typename Body>
  void operator()(int64_t size, int64_t grain, const Body& body) const {
    torch::stable::parallel_for(0, size, grain, body);
  }
};

HeadResult attention_head_cpu(
    const Tensor& features, const Tensor& wc1, const Tensor& wc2, const Tensor& ws1, const Tensor& ws3,
    const Tensor& ws2, const Tensor& ws4, const Tensor& cam_weight, const Tensor& labels) {
  const HeadArguments args(features, wc1, wc2, ws1, ws3, ws2, ws4, cam_weight, labels);
  HeadTensors tensors(args);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    dan_fast::HeadCpu<S, A, Threads>(args.in<S, A>(), Threads()).forward(tensors.out<A>());
  });
  return tensors.result();
}

// Positions of maxima come back from the caller, and an index that is none would be written to.
void check_indices(const char* name, const Tensor& indices, int64_t size) {
  // Without a way out, so that it becomes vectors.
  const int32_t* index = data<int32_t>(indices);
  int32_t least = 0, most = 0;
  for (int64_t i = 0; i < indices.numel(); ++i) {
    least = std::min(least, index[i]);
    most = std::max(most, index[i]);
  }
  STD_TORCH_CHECK(least >= 0 && (most < size || indices.numel() == 0), name,
                  " must be what attention_head gave, indices in [0, ", size, ")");
}

HeadGradients attention_head_backward_cpu(
    const Tensor& features, const Tensor& wc1, const Tensor& wc2, const Tensor& ws1, const Tensor& ws3,
    const Tensor& ws2, const Tensor& ws4, const Tensor& cam_weight, const Tensor& labels, const Tensor& attended,
    const Tensor& mean, const Tensor& channel_attention, const Tensor& spatial_attention, const Tensor& of_mean,
    const Tensor& of_peak, const Tensor& peak, const Tensor& peak_position, const Tensor& mean_map,
    const Tensor& peak_map, const Tensor& peak_channel, const Tensor& adversary_map, const Tensor& grad_attended,
    const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_channel_attention,
    const Tensor& grad_spatial_attention, const Tensor& grad_loss) {
  const HeadArguments args(features, wc1, wc2, ws1, ws3, ws2, ws4, cam_weight, labels);
  const HeadSavedTensors saved(
      args, attended, mean, channel_attention, spatial_attention, of_mean, of_peak, peak, peak_position, mean_map,
      peak_map, peak_channel, adversary_map, grad_attended, grad_pooled, grad_channel_attention,
      grad_spatial_attention, grad_loss);
  check_indices("peak_position", saved.peak_position, args.positions);
  check_indices("peak_channel", saved.peak_channel, args.channels);
  const Layout wanted(features);
  const bool keep = wanted.readable && wanted.dense();
  HeadGradientTensors gradients(
      args, keep ? dan_fast::kept_empty_like(features) : torch::stable::empty_like(features),
      dan_fast::kept_empty_like(args.cam_weight));
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    dan_fast::HeadCpu<S, A, Threads>(args.in<S, A>(), Threads())
        .backward(saved.saved<A>(), saved.grad<A>(), gradients.out<S, A>());
  });
  return gradients.result();
}

#ifdef DAN_FAST_CUDA

// launch(A{}, scalar, workspace, stream) for the type of statistics, on the device of the map.
template <typename Launch>
void on_cuda(const HeadArguments& args, bool backward, const char* what, const Launch& launch) {
  const dan_fast::Scalar scalar = dan_fast::scalar_of(args.features);
  dan_fast::on_device_of(args.features, what, [&](void* stream) {
    const auto run = [&](auto zero) {
      int64_t bytes = 0;
      const int status =
          dan_fast::head_workspace_bytes(scalar, args.in<void, decltype(zero)>(), backward, &bytes);
      if (status != 0) return status;
      // Back to PyTorch's allocator when this returns, for what is queued on this stream later.
      const Tensor workspace = torch::stable::new_empty(args.features, {bytes}, ScalarType::Byte);
      return launch(zero, scalar, workspace.mutable_data_ptr(), stream);
    };
    return args.statistics == ScalarType::Double ? run(double{}) : run(float{});
  });
}

HeadResult attention_head_cuda(
    const Tensor& features, const Tensor& wc1, const Tensor& wc2, const Tensor& ws1, const Tensor& ws3,
    const Tensor& ws2, const Tensor& ws4, const Tensor& cam_weight, const Tensor& labels) {
  const HeadArguments args(features, wc1, wc2, ws1, ws3, ws2, ws4, cam_weight, labels);
  HeadTensors tensors(args);
  on_cuda(args, false, "attention_head", [&](auto zero, dan_fast::Scalar scalar, void* workspace, void* stream) {
    using A = decltype(zero);
    return dan_fast::launch_head_forward(scalar, args.in<void, A>(), tensors.out<A>(), workspace, stream);
  });
  return tensors.result();
}

HeadGradients attention_head_backward_cuda(
    const Tensor& features, const Tensor& wc1, const Tensor& wc2, const Tensor& ws1, const Tensor& ws3,
    const Tensor& ws2, const Tensor& ws4, const Tensor& cam_weight, const Tensor& labels, const Tensor& attended,
    const Tensor& mean, const Tensor& channel_attention, const Tensor& spatial_attention, const Tensor& of_mean,
    const Tensor& of_peak, const Tensor& peak, const Tensor& peak_position, const Tensor& mean_map,
    const Tensor& peak_map, const Tensor& peak_channel, const Tensor& adversary_map, const Tensor& grad_attended,
    const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_channel_attention,
    const Tensor& grad_spatial_attention, const Tensor& grad_loss) {
  const HeadArguments args(features, wc1, wc2, ws1, ws3, ws2, ws4, cam_weight, labels);
  const HeadSavedTensors saved(
      args, attended, mean, channel_attention, spatial_attention, of_mean, of_peak, peak, peak_position, mean_map,
      peak_map, peak_channel, adversary_map, grad_attended, grad_pooled, grad_channel_attention,
      grad_spatial_attention, grad_loss);
  HeadGradientTensors gradients(
      args, torch::stable::empty_like(features), torch::stable::empty_like(args.cam_weight));
  const auto launch = [&](auto zero, dan_fast::Scalar scalar, void* workspace, void* stream) {
    using A = decltype(zero);
    return dan_fast::launch_head_backward(
        scalar, args.in<void, A>(), saved.saved<A>(), saved.grad<A>(), gradients.out<void, A>(), workspace, stream);
  };
  on_cuda(args, true, "attention_head_backward", launch);
  return gradients.result();
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dan_fast, m) {
  m.def(
      "attention_head(Tensor features, Tensor wc1, Tensor wc2, Tensor ws1, Tensor ws3, Tensor ws2, Tensor ws4, Tensor "
      "cam_weight, Tensor labels) -> (Tensor attended, Tensor mean, Tensor channel_attention, Tensor "
      "spatial_attention, Tensor loss, Tensor of_mean, Tensor of_peak, Tensor peak, Tensor peak_position, Tensor "
      "mean_map, Tensor peak_map, Tensor peak_channel, Tensor adversary_map)");
  m.def(
      "attention_head_backward(Tensor features, Tensor wc1, Tensor wc2, Tensor ws1, Tensor ws3, Tensor ws2, Tensor "
      "ws4, Tensor cam_weight, Tensor labels, Tensor attended, Tensor mean, Tensor channel_attention, Tensor "
      "spatial_attention, Tensor of_mean, Tensor of_peak, Tensor peak, Tensor peak_position, Tensor mean_map, Tensor "
      "peak_map, Tensor peak_channel, Tensor adversary_map, Tensor grad_attended, Tensor? grad_pooled, Tensor? "
      "grad_channel_attention, Tensor grad_spatial_attention, Tensor grad_loss) -> (Tensor features, Tensor wc1, "
      "Tensor wc2, Tensor ws1, Tensor ws3, Tensor ws2, Tensor ws4, Tensor cam_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) {
  m.impl("attention_head", TORCH_BOX(&attention_head_cpu));
  m.impl("attention_head_backward", TORCH_BOX(&attention_head_backward_cpu));
}

#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) {
  m.impl("attention_head", TORCH_BOX(&attention_head_cuda));
  m.impl("attention_head_backward", TORCH_BOX(&attention_head_backward_cuda));
}
#endif
