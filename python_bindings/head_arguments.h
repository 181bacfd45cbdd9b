// Arguments and results of torch.ops.dan_fast.attention_head and its derivative: checked, and as csrc/attention/head.h
// wants them, whichever device's kernel is to read them.
#pragma once

#include <optional>
#include <tuple>

#include "feature_maps.h"

namespace dan_fast::head {

// The arguments of both directions.
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

  Tensor fit_by_unit(const char* name, const Tensor& tensor) const {
    return fit(name, tensor, "(B, C / r)", {batch, units}, statistics);
  }

  // S is void where only the launch knows it.
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

// What the head gives.
struct HeadTensors {
  explicit HeadTensors(const HeadArguments& x)
      : mean(x.empty({x.batch, x.channels})), peak(x.empty({x.batch, x.channels})),
        channel_attention(x.empty({x.batch, x.channels})), attended(x.empty({x.batch, x.channels})),
        peak_position(x.indices(x.channels)), of_mean(x.empty({x.batch, x.units})),
        of_peak(x.empty({x.batch, x.units})), spatial_attention(x.empty({x.batch, x.positions})),
        mean_map(x.empty({x.batch, x.positions})), peak_map(x.empty({x.batch, x.positions})),
        adversary_map(x.empty({x.batch, x.positions})), peak_channel(x.indices(x.positions)), loss(x.empty({x.batch})) {
  }

  template <typename A>
  dan_fast::HeadOutput<A> out() {
    return {{data<A>(mean), data<A>(peak), data<int32_t>(peak_position)},
            data<A>(of_mean),
            data<A>(of_peak),
            data<A>(channel_attention),
            {data<A>(attended), data<A>(spatial_attention), data<A>(loss), data<A>(mean_map), data<A>(peak_map),
             data<int32_t>(peak_channel), data<A>(adversary_map)}};
  }

  HeadResult result() const {
    return {attended, mean, channel_attention, spatial_attention, loss, of_mean, of_peak, peak, peak_position, mean_map,
            peak_map, peak_channel, adversary_map};
  }

  Tensor mean, peak, channel_attention, attended, peak_position, of_mean, of_peak;
  Tensor spatial_attention, mean_map, peak_map, adversary_map, peak_channel, loss;
};

// What the backward pass reads beside the arguments: results of the head and their gradients.
struct HeadSavedTensors {
  HeadSavedTensors(
      const HeadArguments& x, const Tensor& attended_, const Tensor& mean_, const Tensor& channel_attention_,
      const Tensor& spatial_attention_, const Tensor& of_mean_, const Tensor& of_peak_, const Tensor& peak_,
      const Tensor& peak_position_, const Tensor& mean_map_, const Tensor& peak_map_, const Tensor& peak_channel_,
      const Tensor& adversary_map_, const Tensor& grad_attended_, const std::optional<Tensor>& grad_pooled_,
      const std::optional<Tensor>& grad_channel_attention_, const Tensor& grad_spatial_attention_,
      const Tensor& grad_loss_)
      : attended(x.by_channel("attended", attended_)), mean(x.by_channel("mean", mean_)),
        channel_attention(x.by_channel("channel_attention", channel_attention_)),
        spatial_attention(x.by_position("spatial_attention", spatial_attention_)),
        of_mean(x.fit_by_unit("of_mean", of_mean_)), of_peak(x.fit_by_unit("of_peak", of_peak_)),
        peak(x.by_channel("peak", peak_)),
        peak_position(x.fit("peak_position", peak_position_, "(B, C)", {x.batch, x.channels}, ScalarType::Int)),
        mean_map(x.by_position("mean_map", mean_map_)), peak_map(x.by_position("peak_map", peak_map_)),
        peak_channel(x.fit("peak_channel", peak_channel_, "(B, H W)", {x.batch, x.positions}, ScalarType::Int)),
        adversary_map(x.by_position("adversary_map", adversary_map_)),
        grad_attended(x.by_channel("grad_attended", grad_attended_)),
        grad_spatial_attention(x.by_position("grad_spatial_attention", grad_spatial_attention_)),
        grad_loss(x.fit("grad_loss", grad_loss_, "(B,)", {x.batch}, x.statistics)) {
    const auto fit = [&](const char* name, const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? std::optional<Tensor>(x.by_channel(name, *tensor)) : std::nullopt;
    };
    grad_pooled = fit("grad_pooled", grad_pooled_);
    grad_channel_attention = fit("grad_channel_attention", grad_channel_attention_);
  }

  template <typename A>
  dan_fast::HeadSaved<A> saved() const {
    return {data<A>(mean),
            data<A>(peak),
            data<int32_t>(peak_position),
            data<A>(of_mean),
            data<A>(of_peak),
            data<A>(channel_attention),
            {data<A>(attended), data<A>(spatial_attention), data<A>(mean_map), data<A>(peak_map),
             data<int32_t>(peak_channel), data<A>(adversary_map)}};
  }

  template <typename A>
  dan_fast::HeadGrad<A> grad() const {
    const auto or_null = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? data<A>(*tensor) : static_cast<const A*>(nullptr);
    };
    return {{data<A>(grad_attended), data<A>(grad_spatial_attention), data<A>(grad_loss)},
            or_null(grad_pooled),
            or_null(grad_channel_attention)};
  }

  const Tensor attended, mean, channel_attention, spatial_attention, of_mean, of_peak, peak, peak_position;
  const Tensor mean_map, peak_map, peak_channel, adversary_map, grad_attended, grad_spatial_attention, grad_loss;
  std::optional<Tensor> grad_pooled, grad_channel_attention;
};

using HeadGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradients of the arguments. `grad_` and `by_cam_weight_` are of the shapes and strides of map and classifier.
struct HeadGradientTensors {
  HeadGradientTensors(const HeadArguments& x, const Tensor& grad_, const Tensor& by_cam_weight_)
      : grad(grad_), by_features(grad_), by_wc1(x.empty({x.units, x.channels})),
        by_wc2(x.empty({x.channels, x.units})), by_ws1(x.empty({x.hidden, x.positions})),
        by_ws3(x.empty({x.hidden, x.positions})), by_ws2(x.empty({x.positions, x.hidden})),
        by_ws4(x.empty({x.positions, x.hidden})), by_cam_weight(by_cam_weight_) {}

  template <typename S, typename A>
  dan_fast::HeadInputGrad<S, A> out() {
    return {by_features.layout.map(static_cast<S*>(by_features.features.mutable_data_ptr())), data<A>(by_wc1),
            data<A>(by_wc2), data<A>(by_ws1), data<A>(by_ws3), data<A>(by_ws2), data<A>(by_ws4),
            data<A>(by_cam_weight)};
  }

  // Where no kernel writes the strides of the map, what was written is copied.
  HeadGradients result() {
    const bool in_place = by_features.features.const_data_ptr() == grad.const_data_ptr();
    return {in_place ? grad : torch::stable::copy_(grad, by_features.features), by_wc1, by_wc2, by_ws1, by_ws3, by_ws2,
            by_ws4, by_cam_weight};
  }

  Tensor grad;
  const Features by_features;
  Tensor by_wc1, by_wc2, by_ws1, by_ws3, by_ws2, by_ws4, by_cam_weight;
};

}  // namespace dan_fast::head
