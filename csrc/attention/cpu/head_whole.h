// The whole attention head on the CPU: the passes of head.h and between them the products of the bottleneck.
//
// `parallel(size, grain, body)` is the caller's: it calls body(first, last) for ranges that make up [0, size), in any
// number of threads. No result depends on how many.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <thread>

#include "../../cpu/cache.h"
#include "../rules.h"
#include "head_passes.h"
#include "product.h"

namespace dan_fast {

template <typename S, typename A, typename Parallel>
class HeadCpu {
 public:
  HeadCpu(const HeadInput<S, A>& in, const Parallel& parallel)
      : in_(in), batch_(in.features.batch), channels_(in.features.channels), positions_(in.features.positions),
        parallel_(parallel) {}

  void forward(const HeadOutput<A>& out) const {
    const std::unique_ptr<A[]> units(new A[batch_ * in_.units]), rows(new A[batch_ * channels_]);
    const Matrix<A> reduce = wc1().transposed(), expand = wc2().transposed();
    const int64_t group = group_samples();
    const bool several = group < batch_;
    const std::unique_ptr<A[]> reduce_packed = several ? pack(reduce) : nullptr;
    const std::unique_ptr<A[]> expand_packed = several ? pack(expand) : nullptr;
    for (int64_t first = 0; first < batch_; first += group) {
      const int64_t count = std::min(group, batch_ - first), unit = first * in_.units, channel = first * channels_;
      A *of_mean = out.of_mean + unit, *of_peak = out.of_peak + unit, *sum = units.get() + unit;
      pool(out.pooled, first, count);
      multiply({{out.pooled.mean + channel, count, channels_}, reduce, nullptr, of_mean, false,
                out.pooled.peak + channel, of_peak, reduce_packed.get()});
      relu_sum(of_mean, of_peak, count * in_.units, sum);
      multiply({{sum, count, in_.units}, expand, nullptr, out.channel_attention + channel, true, nullptr, nullptr,
                expand_packed.get()});
      attend({out.channel_attention, rows.get(), in_.labels, in_.spatial}, out.attended, rows.get(), first, count);
    }
  }

  void backward(const HeadOutput<const A>& saved, const HeadGrad<A>& grad, const HeadInputGrad<S, A>& out) const {
    const int64_t wide = batch_ * channels_, map = batch_ * positions_;
    const std::unique_ptr<A[]> vectors(new A[3 * wide]), maps(new A[3 * map]), units(new A[3 * batch_ * in_.units]);
    // Two are reused: that of the rows' gradients when they have been added up, that of the logits' when both products
    // have read them.
    A *rows = vectors.get(), *grad_rows = rows + wide, *grad_logits = grad_rows + wide;
    A *grad_mean = grad_rows, *grad_peak = grad_logits;
    const AttendInputGrad<A> grad_input = {grad_logits, grad_rows, maps.get(), maps.get() + map, maps.get() + 2 * map,
                                         out.ws1,   out.ws3, out.ws2,    out.ws4};
    attend_backward(saved, grad, rows, grad_input);
    add_up_rows(grad_rows, out.cam_weight);
    bottleneck_backward(saved, grad.pooled, grad_logits, units.get(), grad_mean, grad_peak, out);
    const FeaturesGradInput<A> grad_features = {
        saved.channel_attention, rows, saved.attended.spatial_attention, saved.attended.peak_channel,
        saved.pooled.peak_position, grad.attended.attended, grad_input.mean_map, grad_input.peak_map,
        grad_input.adversary_map, grad_mean, grad_peak};
    const auto kernel = DAN_FAST_KERNEL(head_features_backward<S, A>);
    parallel_(batch_, sample_grain(), [&](int64_t from, int64_t to) { kernel(out.features, grad_features, from, to); });
  }

 private:
  // Less than this many multiplications, or elements of the map, are not worth waking a thread for.
  static constexpr int64_t kTask = 1 << 16;

  // Where the shared cache holds all of X, groups only cost: each has its own starts and reads of the weights. A very
  // large cache is shared with other programs.
  static int64_t held_bytes() {
    constexpr int64_t kMost = 32 << 20;
    const int64_t bytes = shared_cache_bytes();
    return bytes == 0 ? kMost : std::min(kMost, bytes);
  }

  // How many samples are pooled before they are attended: as many for each thread, and for products whole tiles of
  // eight rows.
  int64_t group_samples() const {
    const int64_t sample = channels_ * positions_ * static_cast<int64_t>(sizeof(S));
    if (batch_ <= 1 || batch_ * sample <= held_bytes()) return std::max<int64_t>(1, batch_);
    const int64_t step = std::lcm(int64_t{8}, std::max<int64_t>(1, std::thread::hardware_concurrency()));
    // What a group pools has to be there when it is attended, beside all else.
    return std::max<int64_t>(1, held_bytes() / 4 / sample / step) * step;
  }

  void pool(const Pooled<A>& out, int64_t first, int64_t count) const {
    const auto kernel = DAN_FAST_KERNEL(head_pool<S, A>);
    parallel_(count, sample_grain(), [&](int64_t from, int64_t to) {
      kernel(in_.features, out, first + from, first + to);
    });
  }

  void attend(const AttendInput<A>& in, const Attended<A>& out, A* rows, int64_t first, int64_t count) const {
    const auto kernel = DAN_FAST_KERNEL(head_attend<S, A>);
    parallel_(count, sample_grain(), [&](int64_t from, int64_t to) {
      copy_rows(first + from, first + to, rows);
      kernel(in_.features, in, out, first + from, first + to);
    });
  }

  int64_t sample_grain() const { return grain(channels_ * positions_); }
  static int64_t grain(int64_t size) { return std::max<int64_t>(1, kTask / std::max<int64_t>(1, size)); }

  void attend_backward(const HeadOutput<const A>& saved, const HeadGrad<A>& grad, A* rows,
                       const AttendInputGrad<A>& out) const {
    const int64_t hidden = in_.spatial.hidden;
    const std::unique_ptr<A[]> gates(new A[3 * batch_ * positions_]), units(new A[6 * batch_ * hidden]);
    const SpatialGradients<A> parts = {gates.get(), units.get()};
    const AttendInput<A> in = {saved.channel_attention, rows, in_.labels, in_.spatial};
    const auto kernel = DAN_FAST_KERNEL(head_attend_backward<S, A>);
    const auto through_sigmoid = DAN_FAST_KERNEL(head_logits_backward<A>);
    parallel_(batch_, sample_grain(), [&](int64_t from, int64_t to) {
      copy_rows(from, to, rows);
      kernel(in_.features, in, saved.attended, grad.attended, out, parts, from, to);
      const int64_t at = from * channels_;
      const A* more = grad.channel_attention == nullptr ? nullptr : grad.channel_attention + at;
      through_sigmoid(saved.channel_attention + at, more, out.channel_attention + at, (to - from) * channels_);
    });
    const auto add_up = DAN_FAST_KERNEL(head_weights_backward<A>);
    parallel_(positions_, grain(6 * (batch_ + 1) * (hidden + 1)), [&](int64_t from, int64_t to) {
      add_up(saved.attended, parts, batch_, positions_, hidden, out, from, to);
    });
  }

  // grad_logits in, grad_mean and grad_peak out; grad_peak may be where grad_logits is.
  void bottleneck_backward(const HeadOutput<const A>& saved, const A* grad_pooled, const A* grad_logits, A* scratch,
                           A* grad_mean, A* grad_peak, const HeadInputGrad<S, A>& out) const {
    const int64_t size = batch_ * in_.units;
    A *sum = scratch, *grad_of_mean = sum + size, *grad_of_peak = grad_of_mean + size;
    multiply({by_channel(grad_logits), wc2(), nullptr, grad_of_mean});
    relu_sum(saved.of_mean, saved.of_peak, size, sum);
    for (int64_t i = 0; i < size; ++i) {
      const A grad_hidden = grad_of_mean[i];
      grad_of_mean[i] = relu_backward(saved.of_mean[i], grad_hidden);
      grad_of_peak[i] = relu_backward(saved.of_peak[i], grad_hidden);
    }
    multiply({by_channel(grad_logits).transposed(), by_unit(sum), nullptr, out.wc2});
    multiply({by_unit(grad_of_mean).transposed(), by_channel(saved.pooled.mean), nullptr, out.wc1});
    multiply({by_unit(grad_of_peak).transposed(), by_channel(saved.pooled.peak), out.wc1, out.wc1});
    multiply({by_unit(grad_of_mean), wc1(), grad_pooled, grad_mean, false, grad_of_peak, grad_peak});
  }

  Matrix<A> by_channel(const A* data) const { return {data, batch_, channels_}; }
  Matrix<A> by_unit(const A* data) const { return {data, batch_, in_.units}; }
  Matrix<A> wc1() const { return {in_.wc1, in_.units, channels_}; }
  Matrix<A> wc2() const { return {in_.wc2, channels_, in_.units}; }

  std::unique_ptr<A[]> pack(const Matrix<A>& right) const {
    const auto kernel = DAN_FAST_KERNEL(product_pack<A>);
    const int64_t width = DAN_FAST_KERNEL(product_width<A>)(), strips = (right.columns + width - 1) / width;
    std::unique_ptr<A[]> result(new A[strips * width * right.rows]);
    parallel_(strips, grain(right.rows * width), [&](int64_t from, int64_t to) {
      kernel(right, from * width, std::min(right.columns, to * width), result.get());
    });
    return result;
  }

  void multiply(const Product<A>& product) const {
    const auto kernel = DAN_FAST_KERNEL(product_columns<A>);
    const int64_t width = DAN_FAST_KERNEL(product_width<A>)(), columns = product.right.columns;
    const int64_t strip = product.left.rows * product.left.columns * width;
    parallel_((columns + width - 1) / width, grain(strip), [&](int64_t from, int64_t to) {
      kernel(product, from * width, std::min(columns, to * width));
    });
  }

  static void relu_sum(const A* a, const A* b, int64_t size, A* out) {
    for (int64_t i = 0; i < size; ++i) out[i] = relu(a[i]) + relu(b[i]);
  }

  // The classifier's row of each sample's label, 0 for -1. One that is no class takes some row: its loss is not used.
  void copy_rows(int64_t first, int64_t last, A* rows) const {
    for (int64_t b = first; b < last; ++b) {
      A* to = rows + b * channels_;
      if (in_.labels[b] < 0) {
        std::fill_n(to, channels_, A(0));
      } else {
        std::copy_n(in_.cam_weight + class_of(b) * channels_, channels_, to);
      }
    }
  }

  int64_t class_of(int64_t sample) const { return std::clamp<int64_t>(in_.labels[sample], 0, in_.classes - 1); }

  // In the order of the samples, whatever the number of threads.
  void add_up_rows(const A* grad_rows, A* grad_cam_weight) const {
    parallel_(in_.classes, grain(channels_), [&](int64_t from, int64_t to) {
      std::fill_n(grad_cam_weight + from * channels_, (to - from) * channels_, A(0));
      for (int64_t b = 0; b < batch_; ++b) {
        if (in_.labels[b] < 0 || class_of(b) < from || class_of(b) >= to) continue;
        A* row = grad_cam_weight + class_of(b) * channels_;
        for (int64_t c = 0; c < channels_; ++c) row[c] += grad_rows[b * channels_ + c];
      }
    });
  }

  const HeadInput<S, A> in_;
  const int64_t batch_, channels_, positions_;
  const Parallel& parallel_;
};

}  // namespace dan_fast
