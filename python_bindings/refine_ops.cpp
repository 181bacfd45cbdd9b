// torch.ops.dan_fast.head_refine, head_adversary and their backward passes. Checks, output tensors, and which kernel
// serves which device; csrc/attention/refine.h says what is computed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "../csrc/attention/refine_cpu.h"
#include "feature_maps.h"

#ifdef DAN_FAST_CUDA
#include "../csrc/attention/refine_launch.h"
#include "cuda_call.h"
#endif

namespace {

using namespace dan_fast::head;
using dan_fast::data;

// Fewer elements of the map than these a thread are not worth waking one.
constexpr int64_t kElementsPerTask = 1 << 16;

// Another map of the same shape, dtype and device.
const Tensor& beside(const char* name, const Tensor& map, const Tensor& features) {
  bool fits = map.dim() == 4;
  std::string got;
  for (int64_t dim = 0; dim < map.dim(); ++dim) {
    fits = fits && map.size(dim) == features.size(dim);
    got += (dim == 0 ? "" : ", ") + std::to_string(map.size(dim));
  }
  STD_TORCH_CHECK(fits, name, " must have the shape of features, got (", got, ")");
  STD_TORCH_CHECK(map.scalar_type() == features.scalar_type(), name, " must have the dtype of features, got ",
                  dan_fast::dtype_name(map.scalar_type()));
  STD_TORCH_CHECK(map.is_cuda() == features.is_cuda() && map.get_device_index() == features.get_device_index(), name,
                  " must be on the device of features");
  return map;
}

template <typename S>
dan_fast::FeatureMap<const S> read(const Tensor& map) {
  return Layout(map).map(data<S>(map));
}

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

  template <typename S>
  dan_fast::FeatureMap<S> written() const {
    return layout.map(static_cast<S*>(features.mutable_data_ptr()));
  }

  Tensor result() const {
    if (features.const_data_ptr() == wanted.const_data_ptr()) return wanted;
    Tensor copy = wanted;
    return torch::stable::copy_(copy, features);
  }

  const Tensor wanted;
};

struct RefineArguments : Written {
  RefineArguments(const Tensor& features_, const Tensor& channel_attention_, const Tensor& spatial_attention_)
      : Written(torch::stable::empty_like(features_)), x(alike(features_)),
        channel_attention(by_channel("channel_attention", channel_attention_)),
        spatial_attention(by_position("spatial_attention", spatial_attention_)) {}

  template <typename A>
  dan_fast::Attentions<A> in() const {
    return {data<A>(channel_attention), data<A>(spatial_attention)};
  }

  const Tensor x, channel_attention, spatial_attention;
};

struct RefineBackwardArguments : RefineArguments {
  RefineBackwardArguments(const Tensor& features_, const Tensor& channel_attention_, const Tensor& spatial_attention_,
                          const Tensor& grad_refined_)
      : RefineArguments(features_, channel_attention_, spatial_attention_),
        grad_refined(alike(beside("grad_refined", grad_refined_, features_))),
        by_channel_attention(empty({batch, channels})), by_spatial_attention(empty({batch, positions})) {}

  template <typename A>
  dan_fast::AttentionGrads<A> out() {
    return {data<A>(by_channel_attention), data<A>(by_spatial_attention)};
  }

  const Tensor grad_refined;
  Tensor by_channel_attention, by_spatial_attention;
};

struct AdversaryArguments : Features {
  AdversaryArguments(const Tensor& features_, const Tensor& refined_, const Tensor& rows_, const Tensor& labels_)
      : Features(features_), refined(readable_map(beside("refined", refined_, features_))),
        rows(by_channel("rows", rows_)), labels(fit("labels", labels_, "(B,)", {batch}, ScalarType::Long)),
        loss(empty({batch})), refined_map(empty({batch, positions})), adversary_map(empty({batch, positions})) {}

  template <typename A>
  dan_fast::AdversaryInput<A> in() const {
    return {data<A>(rows), data<int64_t>(labels)};
  }

  template <typename A>
  dan_fast::Adversary<A> out() {
    return {data<A>(loss), data<A>(refined_map), data<A>(adversary_map)};
  }

  const Tensor refined, rows, labels;
  Tensor loss, refined_map, adversary_map;
};

struct AdversaryBackwardArguments : Written {
  AdversaryBackwardArguments(
      const Tensor& features_, const Tensor& rows_, const Tensor& labels_, const Tensor& refined_map_,
      const Tensor& adversary_map_, const Tensor& grad_loss_, const Tensor& grad_refined_map_,
      const Tensor& grad_adversary_map_)
      : Written(torch::stable::empty_like(features_)), x(alike(features_)), rows(by_channel("rows", rows_)),
        labels(fit("labels", labels_, "(B,)", {batch}, ScalarType::Long)),
        refined_map(by_position("refined_map", refined_map_)),
        adversary_map(by_position("adversary_map", adversary_map_)),
        grad_loss(fit("grad_loss", grad_loss_, "(B,)", {batch}, statistics)),
        grad_refined_map(by_position("grad_refined_map", grad_refined_map_)),
        grad_adversary_map(by_position("grad_adversary_map", grad_adversary_map_)),
        by_rows(empty({batch, channels})), by_refined_map(empty({batch, positions})) {}

  template <typename A>
  dan_fast::AdversaryInput<A> in() const {
    return {data<A>(rows), data<int64_t>(labels)};
  }

  template <typename A>
  dan_fast::AdversarySaved<A> saved() const {
    return {data<A>(refined_map), data<A>(adversary_map), data<A>(grad_loss), data<A>(grad_refined_map),
            data<A>(grad_adversary_map)};
  }

  template <typename A>
  dan_fast::AdversaryInputGrad<A> out() {
    return {data<A>(by_rows), data<A>(by_refined_map)};
  }

  const Tensor x, rows, labels, refined_map, adversary_map, grad_loss, grad_refined_map, grad_adversary_map;
  Tensor by_rows, by_refined_map;
};

using Three = std::tuple<Tensor, Tensor, Tensor>;

// kernel(first, last) for ranges of samples.
template <typename Kernel>
void for_samples(const Features& x, const Kernel& kernel) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (x.channels * x.positions));
  torch::stable::parallel_for(0, x.batch, grain, kernel);
}

Tensor head_refine_cpu(
    const Tensor& features, const Tensor& channel_attention, const Tensor& spatial_attention) {
  const RefineArguments args(features, channel_attention, spatial_attention);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(refine_map<S, A>);
    const auto map = read<S>(args.x);
    const auto in = args.in<A>();
    const auto refined = args.written<S>();
    for_samples(args, [&](int64_t first, int64_t last) { kernel(map, in, refined, first, last); });
  });
  return args.result();
}

Three head_refine_backward_cpu(
    const Tensor& features, const Tensor& channel_attention, const Tensor& spatial_attention,
    const Tensor& grad_refined) {
  RefineBackwardArguments args(features, channel_attention, spatial_attention, grad_refined);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(refine_map_backward<S, A>);
    const auto map = read<S>(args.x), grad = read<S>(args.grad_refined);
    const auto in = args.in<A>();
    const auto by_features = args.written<S>();
    const auto out = args.out<A>();
    for_samples(args, [&](int64_t first, int64_t last) { kernel(map, in, grad, by_features, out, first, last); });
  });
  return {args.result(), args.by_channel_attention, args.by_spatial_attention};
}

Three head_adversary_cpu(
    const Tensor& features, const Tensor& refined, const Tensor& rows, const Tensor& labels) {
  AdversaryArguments args(features, refined, rows, labels);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(adversary<S, A>);
    const auto map = args.map<S>(), of_refined = read<S>(args.refined);
    const auto in = args.in<A>();
    const auto out = args.out<A>();
    for_samples(args, [&](int64_t first, int64_t last) { kernel(map, of_refined, in, out, first, last); });
  });
  return {args.loss, args.refined_map, args.adversary_map};
}

Three head_adversary_backward_cpu(
    const Tensor& features, const Tensor& rows, const Tensor& labels, const Tensor& refined_map,
    const Tensor& adversary_map, const Tensor& grad_loss, const Tensor& grad_refined_map,
    const Tensor& grad_adversary_map) {
  AdversaryBackwardArguments args(
      features, rows, labels, refined_map, adversary_map, grad_loss, grad_refined_map, grad_adversary_map);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(adversary_backward<S, A>);
    const auto map = read<S>(args.x);
    const auto in = args.in<A>();
    const auto saved = args.saved<A>();
    const auto by_features = args.written<S>();
    const auto out = args.out<A>();
    for_samples(args, [&](int64_t first, int64_t last) { kernel(map, in, saved, by_features, out, first, last); });
  });
  return {args.result(), args.by_refined_map, args.by_rows};
}

#ifdef DAN_FAST_CUDA

dan_fast::AnyFeatureMap any_map(const Tensor& map, void* data) {
  const Layout at(map);
  return {dan_fast::scalar_of(map), data, at.batch, at.channels, at.positions, at.sample_stride, at.channel_stride,
          at.position_stride};
}

dan_fast::AnyFeatureMap read_any(const Tensor& map) { return any_map(map, const_cast<void*>(map.const_data_ptr())); }

dan_fast::AnyFeatureMap written_any(const Written& args) {
  return any_map(args.features, args.features.mutable_data_ptr());
}

// launch(A{}, stream) for the type of statistics, on the device of the map.
template <typename Launch>
void on_cuda(const Features& x, const char* what, const Launch& launch) {
  dan_fast::on_device_of(x.features, what, [&](void* stream) {
    return x.statistics == ScalarType::Double ? launch(double{}, stream) : launch(float{}, stream);
  });
}

Tensor head_refine_cuda(
    const Tensor& features, const Tensor& channel_attention, const Tensor& spatial_attention) {
  const RefineArguments args(features, channel_attention, spatial_attention);
  on_cuda(args, "head_refine", [&](auto zero, void* stream) {
    return dan_fast::launch_refine(read_any(args.x), args.in<decltype(zero)>(), written_any(args), stream);
  });
  return args.result();
}

Three head_refine_backward_cuda(
    const Tensor& features, const Tensor& channel_attention, const Tensor& spatial_attention,
    const Tensor& grad_refined) {
  RefineBackwardArguments args(features, channel_attention, spatial_attention, grad_refined);
  // Back to PyTorch's allocator when this returns, for what is queued on this stream later; so below.
  Tensor partial = args.empty({args.batch, dan_fast::map_parts(args.channels), args.positions});
  on_cuda(args, "head_refine_backward", [&](auto zero, void* stream) {
    using A = decltype(zero);
    return dan_fast::launch_refine_backward(
        read_any(args.x), args.in<A>(), read_any(args.grad_refined), written_any(args), args.out<A>(),
        data<A>(partial), stream);
  });
  return {args.result(), args.by_channel_attention, args.by_spatial_attention};
}

Three head_adversary_cuda(
    const Tensor& features, const Tensor& refined, const Tensor& rows, const Tensor& labels) {
  AdversaryArguments args(features, refined, rows, labels);
  Tensor partial = args.empty({2, args.batch, dan_fast::map_parts(args.channels), args.positions});
  on_cuda(args, "head_adversary", [&](auto zero, void* stream) {
    using A = decltype(zero);
    return dan_fast::launch_adversary(
        read_any(args.features), read_any(args.refined), args.in<A>(), args.out<A>(), data<A>(partial), stream);
  });
  return {args.loss, args.refined_map, args.adversary_map};
}

Three head_adversary_backward_cuda(
    const Tensor& features, const Tensor& rows, const Tensor& labels, const Tensor& refined_map,
    const Tensor& adversary_map, const Tensor& grad_loss, const Tensor& grad_refined_map,
    const Tensor& grad_adversary_map) {
  AdversaryBackwardArguments args(
      features, rows, labels, refined_map, adversary_map, grad_loss, grad_refined_map, grad_adversary_map);
  on_cuda(args, "head_adversary_backward", [&](auto zero, void* stream) {
    using A = decltype(zero);
    return dan_fast::launch_adversary_backward(
        read_any(args.x), args.in<A>(), args.saved<A>(), written_any(args), args.out<A>(), stream);
  });
  return {args.result(), args.by_refined_map, args.by_rows};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dan_fast, m) {
  m.def("head_refine(Tensor features, Tensor channel_attention, Tensor spatial_attention) -> Tensor refined");
  m.def(
      "head_refine_backward(Tensor features, Tensor channel_attention, Tensor spatial_attention, Tensor grad_refined) "
      "-> (Tensor features, Tensor channel_attention, Tensor spatial_attention)");
  m.def(
      "head_adversary(Tensor features, Tensor refined, Tensor rows, Tensor labels) -> (Tensor loss, Tensor "
      "refined_map, Tensor adversary_map)");
  m.def(
      "head_adversary_backward(Tensor features, Tensor rows, Tensor labels, Tensor refined_map, Tensor adversary_map, "
      "Tensor grad_loss, Tensor grad_refined_map, Tensor grad_adversary_map) -> (Tensor features, Tensor refined_map, "
      "Tensor rows)");
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) {
  m.impl("head_refine", TORCH_BOX(&head_refine_cpu));
  m.impl("head_refine_backward", TORCH_BOX(&head_refine_backward_cpu));
  m.impl("head_adversary", TORCH_BOX(&head_adversary_cpu));
  m.impl("head_adversary_backward", TORCH_BOX(&head_adversary_backward_cpu));
}

#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) {
  m.impl("head_refine", TORCH_BOX(&head_refine_cuda));
  m.impl("head_refine_backward", TORCH_BOX(&head_refine_backward_cuda));
  m.impl("head_adversary", TORCH_BOX(&head_adversary_cuda));
  m.impl("head_adversary_backward", TORCH_BOX(&head_adversary_backward_cuda));
}
#endif
