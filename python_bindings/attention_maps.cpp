// torch.ops.dan_fast.head_refine, head_adversary and their backward passes. Checks and output tensors;
// csrc/attention/refine.h says what is computed.
#include <algorithm>

#include "../csrc/attention/cpu/refine_passes.h"
#include "../csrc/attention/cuda/refine_launch.h"
#include "feature_maps.h"

namespace {

using namespace dan_fast;

// Another map of the same shape, dtype and device.
const Tensor& beside(const char* name, const Tensor& map, const Tensor& features) {
  STD_TORCH_CHECK(map.dim() == 4 && has_sizes(map, features.sizes()), name, " must have the shape of features, got (",
                  listed(map.sizes()), ")");
  STD_TORCH_CHECK(map.scalar_type() == features.scalar_type(), name, " must have the dtype of features, got ",
                  dtype_name(map.scalar_type()));
  STD_TORCH_CHECK(on_one_device(map, features), name, " must be on the device of features");
  return map;
}

// kernel(first, last) for ranges of samples.
template <typename Kernel>
void for_samples(const Features& x, const Kernel& kernel) {
  // A task of fewer elements of the map costs less than waking a thread.
  constexpr int64_t kElementsPerTask = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (x.channels * x.positions));
  torch::stable::parallel_for(0, x.batch, grain, kernel);
}

// Room for what each block of channels has of a sum over all of them.
Tensor partial_sums(const Features& x, int64_t sums) {
  return x.empty({sums, x.batch, map_parts(x.channels), x.positions});
}

struct RefineArguments : Written {
  RefineArguments(const Tensor& features_, const Tensor& channel_attention_, const Tensor& spatial_attention_)
      : Written(torch::stable::empty_like(features_)), x(alike(features_)),
        channel_attention(by_channel("channel_attention", channel_attention_)),
        spatial_attention(by_position("spatial_attention", spatial_attention_)) {}

  template <typename A>
  Attentions<A> pointers() const {
    return {data<const A>(channel_attention), data<const A>(spatial_attention)};
  }

  const Tensor x, channel_attention, spatial_attention;
};

Tensor head_refine(const Tensor& features, const Tensor& channel_attention, const Tensor& spatial_attention) {
  const RefineArguments args(features, channel_attention, spatial_attention);
  for_storage(args.features, [&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto map = map_of<const S>(args.x);
    const auto in = args.pointers<A>();
    const auto refined = map_of<S>(args.features);
    const auto on_cpu = [&] {
      const auto kernel = DAN_FAST_KERNEL(refine_map<S, A>);
      for_samples(args, [&](int64_t first, int64_t last) { kernel(map, in, refined, first, last); });
    };
    on_device_of(args.features, "head_refine", on_cpu, [&](auto stream) {
      return RefineCuda<S>::refine(map, in, refined, stream);
    });
  });
  return args.result();
}

Tensors<3> head_refine_backward(
    const Tensor& features, const Tensor& channel_attention, const Tensor& spatial_attention,
    const Tensor& grad_refined_) {
  const RefineArguments args(features, channel_attention, spatial_attention);
  const Tensor grad_refined = args.alike(beside("grad_refined", grad_refined_, features));
  const Tensor grad_channel_attention = args.empty({args.batch, args.channels});
  const Tensor grad_spatial_attention = args.empty({args.batch, args.positions});
  for_storage(args.features, [&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto map = map_of<const S>(args.x), grad = map_of<const S>(grad_refined);
    const auto in = args.pointers<A>();
    const auto grad_map = map_of<S>(args.features);
    const AttentionGrads<A> out = {data<A>(grad_channel_attention), data<A>(grad_spatial_attention)};
    const auto on_cpu = [&] {
      const auto kernel = DAN_FAST_KERNEL(refine_map_backward<S, A>);
      for_samples(args, [&](int64_t first, int64_t last) { kernel(map, in, grad, grad_map, out, first, last); });
    };
    on_device_of(args.features, "head_refine_backward", on_cpu, [&](auto stream) {
      const Tensor partial = partial_sums(args, 1);
      return RefineCuda<S>::refine_backward(map, in, grad, grad_map, out, data<A>(partial), stream);
    });
  });
  return {args.result(), grad_channel_attention, grad_spatial_attention};
}

Tensors<3> head_adversary(
    const Tensor& features, const Tensor& refined_, const Tensor& rows_, const Tensor& labels_) {
  const Features x(features);
  const Tensor refined = readable_map(beside("refined", refined_, features)), rows = x.by_channel("rows", rows_);
  const Tensor labels = x.by_sample("labels", labels_, ScalarType::Long), loss = x.empty({x.batch});
  const Tensor refined_map = x.empty({x.batch, x.positions}), adversary_map = x.empty({x.batch, x.positions});
  for_storage(x.features, [&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto map = map_of<const S>(x.features), of_refined = map_of<const S>(refined);
    const AdversaryInput<A> in = {data<const A>(rows), data<const int64_t>(labels)};
    const Adversary<A> out = {data<A>(loss), data<A>(refined_map), data<A>(adversary_map)};
    const auto on_cpu = [&] {
      const auto kernel = DAN_FAST_KERNEL(adversary<S, A>);
      for_samples(x, [&](int64_t first, int64_t last) { kernel(map, of_refined, in, out, first, last); });
    };
    on_device_of(x.features, "head_adversary", on_cpu, [&](auto stream) {
      const Tensor partial = partial_sums(x, 2);
      return RefineCuda<S>::adversary(map, of_refined, in, out, data<A>(partial), stream);
    });
  });
  return {loss, refined_map, adversary_map};
}

// The arguments of head_adversary_backward, in the order of its schema.
struct AdversaryBackwardCall {
  Tensor features, rows, labels, refined_map, adversary_map, grad_loss, grad_refined_map, grad_adversary_map;

  using Types = Tensors<8>;
};

Tensors<3> head_adversary_backward(const AdversaryBackwardCall& call) {
  const Written x(torch::stable::empty_like(call.features));
  const Tensor features = x.alike(call.features), rows = x.by_channel("rows", call.rows);
  const Tensor labels = x.by_sample("labels", call.labels, ScalarType::Long);
  const Tensor refined_map = x.by_position("refined_map", call.refined_map);
  const Tensor adversary_map = x.by_position("adversary_map", call.adversary_map);
  const Tensor grad_loss = x.by_sample("grad_loss", call.grad_loss, x.statistics);
  const Tensor grad_refined_map = x.by_position("grad_refined_map", call.grad_refined_map);
  const Tensor grad_adversary_map = x.by_position("grad_adversary_map", call.grad_adversary_map);
  const Tensor grad_rows = x.empty({x.batch, x.channels}), grad_refined = x.empty({x.batch, x.positions});
  for_storage(x.features, [&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto map = map_of<const S>(features);
    const AdversaryInput<A> in = {data<const A>(rows), data<const int64_t>(labels)};
    const AdversarySaved<A> saved = {data<const A>(refined_map), data<const A>(adversary_map), data<const A>(grad_loss),
                                     data<const A>(grad_refined_map), data<const A>(grad_adversary_map)};
    const auto grad_map = map_of<S>(x.features);
    const AdversaryInputGrad<A> out = {data<A>(grad_rows), data<A>(grad_refined)};
    const auto on_cpu = [&] {
      const auto kernel = DAN_FAST_KERNEL(adversary_backward<S, A>);
      for_samples(x, [&](int64_t first, int64_t last) { kernel(map, in, saved, grad_map, out, first, last); });
    };
    on_device_of(x.features, "head_adversary_backward", on_cpu, [&](auto stream) {
      return RefineCuda<S>::adversary_backward(map, in, saved, grad_map, out, stream);
    });
  });
  return {x.result(), grad_refined, grad_rows};
}

template <typename Library>
void implement(Library& m) {
  m.impl("head_refine", TORCH_BOX(&head_refine));
  m.impl("head_refine_backward", TORCH_BOX(&head_refine_backward));
  m.impl("head_adversary", TORCH_BOX(&head_adversary));
  m.impl("head_adversary_backward", DAN_FAST_BOX(AdversaryBackwardCall, head_adversary_backward));
}

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

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) { implement(m); }
#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) { implement(m); }
#endif
