// torch.ops.dan_fast.attention_head, attention_head_backward: the whole attention head in one call each way.
// csrc/attention/head.h says what is computed.
#include <algorithm>
#include <optional>

#include "../csrc/attention/cpu/head_whole.h"
#include "../csrc/attention/cuda/head_launch.h"
#include "feature_maps.h"

namespace {

using namespace dan_fast;

// The arguments of attention_head, in the order of its schema.
struct HeadCall {
  Tensor features, wc1, wc2, ws1, ws3, ws2, ws4, cam_weight, labels;

  using Types = Tensors<9>;
};

// Of the results the first, for losses to be made of; `loss` comes next.
struct HeadResults {
  Tensor attended, mean, channel_attention, spatial_attention;
};

// Then what only the backward pass reads.
struct HeadKept {
  Tensor of_mean, of_peak, peak, peak_position, mean_map, peak_map, peak_channel, adversary_map;
};

struct HeadBackwardCall {
  HeadCall forward;
  HeadResults results;
  HeadKept kept;
  Tensor grad_attended;
  std::optional<Tensor> grad_pooled, grad_channel_attention;
  Tensor grad_spatial_attention, grad_loss;

  using Types = Joined<Tensors<22>, std::tuple<std::optional<Tensor>, std::optional<Tensor>>, Tensors<2>>;
};

// For the forward pass to write or, of a const A, the backward to read.
template <typename A>
HeadOutput<A> output_of(const HeadResults& results, const HeadKept& kept, A* loss) {
  return {{data<A>(results.mean), data<A>(kept.peak), data<PeakIndex<A>>(kept.peak_position)},
          data<A>(kept.of_mean),
          data<A>(kept.of_peak),
          data<A>(results.channel_attention),
          {data<A>(results.attended), data<A>(results.spatial_attention), loss, data<A>(kept.mean_map),
           data<A>(kept.peak_map), data<PeakIndex<A>>(kept.peak_channel), data<A>(kept.adversary_map)}};
}

// What both directions read.
struct Arguments : Features {
  explicit Arguments(const HeadCall& x)
      : Features(x.features), units(rows_of(x.wc1)), hidden(rows_of(x.ws1)), classes(rows_of(x.cam_weight)),
        wc1(fit("wc1", x.wc1, "(C / r, C)", {units, channels}, statistics)),
        wc2(fit("wc2", x.wc2, "(C, C / r)", {channels, units}, statistics)),
        ws1(fit("ws1", x.ws1, "(h, H W)", {hidden, positions}, statistics)),
        ws3(fit("ws3", x.ws3, "(h, H W)", {hidden, positions}, statistics)),
        ws2(fit("ws2", x.ws2, "(H W, h)", {positions, hidden}, statistics)),
        ws4(fit("ws4", x.ws4, "(H W, h)", {positions, hidden}, statistics)),
        cam_weight(fit("cam_weight", x.cam_weight, "(c, C)", {classes, channels}, statistics)),
        labels(by_sample("labels", x.labels, ScalarType::Long)) {
    STD_TORCH_CHECK(classes > 0, "cam_weight must have at least one row");
  }

  static int64_t rows_of(const Tensor& matrix) { return matrix.dim() == 2 ? matrix.size(0) : 0; }

  Tensor by_unit(const char* name, const Tensor& tensor) const {
    return fit(name, tensor, "(B, C / r)", {batch, units}, statistics);
  }

  template <typename S, typename A>
  HeadInput<S, A> pointers() const {
    return {map_of<const S>(features), units, data<const A>(wc1), data<const A>(wc2), classes,
            data<const A>(cam_weight), data<const int64_t>(labels),
            {hidden, data<const A>(ws1), data<const A>(ws3), data<const A>(ws2), data<const A>(ws4)}};
  }

  const int64_t units, hidden, classes;
  const Tensor wc1, wc2, ws1, ws3, ws2, ws4, cam_weight, labels;
};

struct Threads {
  template <typename Body>
  void operator()(int64_t size, int64_t grain, const Body& body) const {
    torch::stable::parallel_for(0, size, grain, body);
  }
};

// launch(workspace) for one direction where it takes one; a CUDA error code.
template <typename S, typename A, typename Launch>
int with_workspace(const Arguments& args, const HeadInput<S, A>& in, bool backward, const Launch& launch) {
  int64_t bytes = 0;
  const int status = HeadCuda<S>::workspace_bytes(in, backward, &bytes);
  if (status != 0) return status;
  return launch(torch::stable::new_empty(args.features, {bytes}, ScalarType::Byte).mutable_data_ptr());
}

Tensors<13> attention_head(const HeadCall& call) {
  const Arguments x(call);
  const auto by_channel = [&] { return x.empty({x.batch, x.channels}); };
  const auto by_position = [&] { return x.empty({x.batch, x.positions}); };
  const HeadResults results = {by_channel(), by_channel(), by_channel(), by_position()};
  const Tensor loss = x.empty({x.batch});
  const HeadKept kept = {x.empty({x.batch, x.units}), x.empty({x.batch, x.units}), by_channel(), x.indices(x.channels),
                         by_position(), by_position(), x.indices(x.positions), by_position()};
  for_storage(x.features, [&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto in = x.pointers<S, A>();
    const auto out = output_of<A>(results, kept, data<A>(loss));
    on_device_of(
        x.features, "attention_head", [&] { HeadCpu<S, A, Threads>(in, Threads()).forward(out); },
        [&](auto stream) {
          return with_workspace(
              x, in, false, [&](void* memory) { return HeadCuda<S>::forward(in, out, memory, stream); });
        });
  });
  const auto& [attended, mean, channel_attention, spatial_attention] = results;
  const auto& [of_mean, of_peak, peak, peak_position, mean_map, peak_map, peak_channel, adversary_map] = kept;
  return {attended, mean, channel_attention, spatial_attention, loss, of_mean, of_peak, peak, peak_position, mean_map,
          peak_map, peak_channel, adversary_map};
}

// Positions of maxima come back from the caller; memory is written at them.
void check_indices(const char* name, const Tensor& indices, int64_t size) {
  if (indices.is_cuda()) return;  // reading them would wait for the GPU
  // No early exit, so that the loop becomes vectors.
  const int32_t* index = data<const int32_t>(indices);
  int32_t least = 0, most = 0;
  for (int64_t i = 0; i < indices.numel(); ++i) {
    least = std::min(least, index[i]);
    most = std::max(most, index[i]);
  }
  STD_TORCH_CHECK(least >= 0 && (most < size || indices.numel() == 0), name,
                  " must be what attention_head gave, indices in [0, ", size, ")");
}

HeadResults checked_results(const Arguments& x, const HeadResults& given) {
  return {x.by_channel("attended", given.attended), x.by_channel("mean", given.mean),
          x.by_channel("channel_attention", given.channel_attention),
          x.by_position("spatial_attention", given.spatial_attention)};
}

HeadKept checked_kept(const Arguments& x, const HeadKept& given) {
  const auto indices = [&](const char* name, const Tensor& tensor, const char* shape, int64_t size, int64_t end) {
    const Tensor result = x.fit(name, tensor, shape, {x.batch, size}, ScalarType::Int);
    check_indices(name, result, end);
    return result;
  };
  return {x.by_unit("of_mean", given.of_mean),
          x.by_unit("of_peak", given.of_peak),
          x.by_channel("peak", given.peak),
          indices("peak_position", given.peak_position, "(B, C)", x.channels, x.positions),
          x.by_position("mean_map", given.mean_map),
          x.by_position("peak_map", given.peak_map),
          indices("peak_channel", given.peak_channel, "(B, H W)", x.positions, x.channels),
          x.by_position("adversary_map", given.adversary_map)};
}

Tensors<8> attention_head_backward(const HeadBackwardCall& call) {
  const Arguments x(call.forward);
  const HeadResults results = checked_results(x, call.results);
  const HeadKept kept = checked_kept(x, call.kept);
  const Tensor grad_attended = x.by_channel("grad_attended", call.grad_attended);
  const Tensor grad_spatial_attention = x.by_position("grad_spatial_attention", call.grad_spatial_attention);
  const Tensor grad_loss = x.by_sample("grad_loss", call.grad_loss, x.statistics);
  const auto if_given = [&](const char* name, const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(x.by_channel(name, *tensor)) : std::nullopt;
  };
  const auto grad_pooled = if_given("grad_pooled", call.grad_pooled);
  const auto grad_channel_attention = if_given("grad_channel_attention", call.grad_channel_attention);

  // Where no kernel writes the strides of the map, what was written is copied.
  const Written grad_features(torch::stable::empty_like(call.forward.features));
  const Tensor grad_cam_weight = torch::stable::empty_like(x.cam_weight);
  const Tensor grad_wc1 = x.empty({x.units, x.channels}), grad_wc2 = x.empty({x.channels, x.units});
  const Tensor grad_ws1 = x.empty({x.hidden, x.positions}), grad_ws3 = x.empty({x.hidden, x.positions});
  const Tensor grad_ws2 = x.empty({x.positions, x.hidden}), grad_ws4 = x.empty({x.positions, x.hidden});
  for_storage(x.features, [&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto in = x.pointers<S, A>();
    const auto saved = output_of<const A>(results, kept, nullptr);
    const auto or_null = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? data<const A>(*tensor) : nullptr;
    };
    const HeadGrad<A> grad = {
        {data<const A>(grad_attended), data<const A>(grad_spatial_attention), data<const A>(grad_loss)},
        or_null(grad_pooled),
        or_null(grad_channel_attention)};
    const HeadInputGrad<S, A> out = {map_of<S>(grad_features.features), data<A>(grad_wc1), data<A>(grad_wc2),
                                     data<A>(grad_ws1), data<A>(grad_ws3), data<A>(grad_ws2), data<A>(grad_ws4),
                                     data<A>(grad_cam_weight)};
    on_device_of(
        x.features, "attention_head_backward",
        [&] { HeadCpu<S, A, Threads>(in, Threads()).backward(saved, grad, out); },
        [&](auto stream) {
          return with_workspace(
              x, in, true, [&](void* memory) { return HeadCuda<S>::backward(in, saved, grad, out, memory, stream); });
        });
  });
  return {grad_features.result(), grad_wc1, grad_wc2, grad_ws1, grad_ws3, grad_ws2, grad_ws4, grad_cam_weight};
}

template <typename Library>
void implement(Library& m) {
  m.impl("attention_head", DAN_FAST_BOX(HeadCall, attention_head));
  m.impl("attention_head_backward", DAN_FAST_BOX(HeadBackwardCall, attention_head_backward));
}

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

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) { implement(m); }
#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) { implement(m); }
#endif
