// torch.ops.dan_fast.attention_head, attention_head_backward: the whole attention head on the CPU in one call each way;
// csrc/attention/head_cpu_whole.h says what is computed.
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

namespace {

using namespace dan_fast::head;
using dan_fast::data;

struct Threads {
  template <typename Body>
  void operator()(int64_t size, int64_t grain, const Body& body) const {
    torch::stable::parallel_for(0, size, grain, body);
  }
};

struct HeadArguments : Features {
  HeadArguments(const Tensor& features_, const Tensor& wc1_, const Tensor& wc2_, const Tensor& ws1_, const Tensor& ws3_,
                const Tensor& ws2_, const Tensor& ws4_, const Tensor& cam_weight_, const Tensor& labels_)
      : Features(features_), units(rows_of(wc1_)), hidden(rows_of(ws1_)), classes(rows_of(cam_weight_)),
        wc1(fit("wc1", wc1_, "(C / r, C)", {units, channels}, statistics)),
        wc2(fit("wc2", wc2_, "(C, C / r)", {channels, units}, statistics)),
        ws1(fit("ws1", ws1_, "(h, H W)", {hidden, positions}, statistics)),
        ws3(fit("ws3", ws3_, "(h, H W)", {hidden, positions}, statistics)),
        ws2(fit("ws2", ws2_, "(H W, h)", {positions, hidden}, statistics)),
        ws4(fit("ws4", ws4_, "(H W, h)", {positions, hidden}, statistics)),
        cam_weight(fit("cam_weight", cam_weight_, "(c, C)", {classes, channels}, statistics)),
        labels(fit("labels", labels_, "(B,)", {batch}, ScalarType::Long)) {
    STD_TORCH_CHECK(classes > 0, "cam_weight must have at least one row");
  }

  static int64_t rows_of(const Tensor& matrix) { return matrix.dim() == 2 ? matrix.size(0) : 0; }

  template <typename S, typename A>
  dan_fast::HeadInput<S, A> in() const {
    return {map<S>(), units, data<A>(wc1), data<A>(wc2), classes, data<A>(cam_weight), data<int64_t>(labels),
            {hidden, data<A>(ws1), data<A>(ws3), data<A>(ws2), data<A>(ws4)}};
  }

  const int64_t units, hidden, classes;
  const Tensor wc1, wc2, ws1, ws3, ws2, ws4, cam_weight, labels;
};

using HeadResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                              Tensor, Tensor>;

HeadResult attention_head_cpu(const Tensor& features, const Tensor& wc1, const Tensor& wc2, const Tensor& ws1,
                            const Tensor& ws3, const Tensor& ws2, const Tensor& ws4, const Tensor& cam_weight,
                            const Tensor& labels) {
  const HeadArguments args(features, wc1, wc2, ws1, ws3, ws2, ws4, cam_weight, labels);
  Tensor mean = args.empty({args.batch, args.channels}), peak = args.empty({args.batch, args.channels});
  Tensor peak_position = args.indices(args.channels), channel_attention = args.empty({args.batch, args.channels});
  Tensor of_mean = args.empty({args.batch, args.units}), of_peak = args.empty({args.batch, args.units});
  AttendedTensors attended(args);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const dan_fast::HeadOutput<A> out = {{data<A>(mean), data<A>(peak), data<int32_t>(peak_position)},
                                         data<A>(of_mean), data<A>(of_peak), data<A>(channel_attention),
                                         attended.out<A>()};
    dan_fast::HeadCpu<S, A, Threads>(args.in<S, A>(), Threads()).forward(out);
  });
  return {attended.attended, mean, channel_attention, attended.spatial_attention, attended.loss, of_mean, of_peak, peak,
          peak_position, attended.mean_map, attended.peak_map, attended.peak_channel, attended.adversary_map};
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

using HeadGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

HeadGradients attention_head_backward_cpu(
    const Tensor& features, const Tensor& wc1, const Tensor& wc2, const Tensor& ws1, const Tensor& ws3,
    const Tensor& ws2, const Tensor& ws4, const Tensor& cam_weight, const Tensor& labels, const Tensor& attended,
    const Tensor& mean, const Tensor& channel_attention, const Tensor& spatial_attention, const Tensor& of_mean,
    const Tensor& of_peak, const Tensor& peak, const Tensor& peak_position, const Tensor& mean_map,
    const Tensor& peak_map, const Tensor& peak_channel, const Tensor& adversary_map, const Tensor& grad_attended,
    const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_channel_attention,
    const Tensor& grad_spatial_attention, const Tensor& grad_loss) {
  const HeadArguments args(features, wc1, wc2, ws1, ws3, ws2, ws4, cam_weight, labels);
  const auto by_unit = [&](const char* name, const Tensor& tensor) {
    return args.fit(name, tensor, "(B, C / r)", {args.batch, args.units}, args.statistics);
  };
  const auto index = [&](const char* name, const Tensor& tensor, const char* shape, int64_t size, int64_t limit) {
    const Tensor fit = args.fit(name, tensor, shape, {args.batch, size}, ScalarType::Int);
    check_indices(name, fit, limit);
    return fit;
  };
  const Tensor attended_ = args.by_channel("attended", attended), mean_ = args.by_channel("mean", mean);
  const Tensor channel_attention_ = args.by_channel("channel_attention", channel_attention);
  const Tensor spatial_attention_ = args.by_position("spatial_attention", spatial_attention);
  const Tensor of_mean_ = by_unit("of_mean", of_mean), of_peak_ = by_unit("of_peak", of_peak);
  const Tensor peak_ = args.by_channel("peak", peak);
  const Tensor peak_position_ = index("peak_position", peak_position, "(B, C)", args.channels, args.positions);
  const Tensor mean_map_ = args.by_position("mean_map", mean_map), peak_map_ = args.by_position("peak_map", peak_map);
  const Tensor peak_channel_ = index("peak_channel", peak_channel, "(B, H W)", args.positions, args.channels);
  const Tensor adversary_map_ = args.by_position("adversary_map", adversary_map);
  const Tensor grad_attended_ = args.by_channel("grad_attended", grad_attended);
  const Tensor grad_spatial_ = args.by_position("grad_spatial_attention", grad_spatial_attention);
  const Tensor grad_loss_ = args.fit("grad_loss", grad_loss, "(B,)", {args.batch}, args.statistics);
  const auto optional = [&](const char* name, const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(args.by_channel(name, *tensor)) : std::nullopt;
  };
  const auto grad_pooled_ = optional("grad_pooled", grad_pooled);
  const auto grad_channel_ = optional("grad_channel_attention", grad_channel_attention);

  const Layout wanted(features);
  const bool keep = wanted.readable && wanted.dense();
  const Tensor grad = keep ? dan_fast::kept_empty_like(features) : torch::stable::empty_like(features);
  const Features by_features(grad);
  Tensor by_wc1 = args.empty({args.units, args.channels}), by_wc2 = args.empty({args.channels, args.units});
  Tensor by_ws1 = args.empty({args.hidden, args.positions}), by_ws3 = args.empty({args.hidden, args.positions});
  Tensor by_ws2 = args.empty({args.positions, args.hidden}), by_ws4 = args.empty({args.positions, args.hidden});
  Tensor by_cam_weight = dan_fast::kept_empty_like(args.cam_weight);
  args.for_types([&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto optional_data = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? data<A>(*tensor) : static_cast<const A*>(nullptr);
    };
    const dan_fast::HeadSaved<A> saved = {
        data<A>(mean_), data<A>(peak_), data<int32_t>(peak_position_), data<A>(of_mean_), data<A>(of_peak_),
        data<A>(channel_attention_),
        {data<A>(attended_), data<A>(spatial_attention_), data<A>(mean_map_), data<A>(peak_map_),
         data<int32_t>(peak_channel_), data<A>(adversary_map_)}};
    const dan_fast::HeadGrad<A> grads = {{data<A>(grad_attended_), data<A>(grad_spatial_), data<A>(grad_loss_)},
                                         optional_data(grad_pooled_), optional_data(grad_channel_)};
    const dan_fast::HeadInputGrad<S, A> out = {
        by_features.layout.map(static_cast<S*>(by_features.features.mutable_data_ptr())),
        data<A>(by_wc1), data<A>(by_wc2), data<A>(by_ws1), data<A>(by_ws3), data<A>(by_ws2), data<A>(by_ws4),
        data<A>(by_cam_weight)};
    dan_fast::HeadCpu<S, A, Threads>(args.in<S, A>(), Threads()).backward(saved, grads, out);
  });
  // Where no kernel writes these strides, what was written is copied.
  const bool in_place = by_features.features.const_data_ptr() == grad.const_data_ptr();
  Tensor result = grad;
  return {in_place ? result : torch::stable::copy_(result, by_features.features), by_wc1, by_wc2, by_ws1, by_ws3,
          by_ws2, by_ws4, by_cam_weight};
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

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) {
  m.impl("attention_head", TORCH_BOX(&attention_head_cpu));
  m.impl("attention_head_backward", TORCH_BOX(&attention_head_backward_cpu));
}
