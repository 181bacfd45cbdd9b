#include "head_columns.h"
#include "head_positions.h"
#include "head_spatial.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// With the sums over p of X_cp A_S,p, X_cp d_mean_map_p and X_cp d_adversary_map_p the gradients of A_C, the peak map's
// share excepted, and of the classifier's rows.
template <typename A>
class ChannelGradients : public ChannelSums<A, 3> {
 public:
  ChannelGradients(int64_t channels, int64_t positions)
      : ChannelSums<A, 3>(channels, positions), channels_(channels), positions_(positions) {}

  void begin(const A* const (&weights)[3], const A* grad_attended, A* channel_attention, A* rows) {
    ChannelSums<A, 3>::begin(weights);
    grad_attended_ = grad_attended;
    channel_attention_ = channel_attention;
    rows_ = rows;
  }

  void end(int64_t channel, int64_t channels) {
    const Vector<A> all = broadcast(static_cast<A>(channels_)), positions = broadcast(static_cast<A>(positions_));
    for (int64_t c = 0; c < channels; c += kWidth<A>) {
      const int64_t at = channel + c, left = channels - c;
      const Vector<A> grad = load_up_to<A>(grad_attended_ + at, left);
      const Vector<A> through_attended = grad * (this->total(0, at) / positions);
      store_up_to<A>(channel_attention_ + at, through_attended + this->total(1, at) / all, left);
      store_up_to<A>(rows_ + at, this->total(2, at), left);
    }
  }

 private:
  const int64_t channels_, positions_;
  const A* grad_attended_ = nullptr;
  A *channel_attention_ = nullptr, *rows_ = nullptr;
};

// An aligned vector to memory.
template <typename T>
inline void store_past_caches(T* to, Vector<T> values) {
#if defined(__AVX512F__)
  __m512i bits;
  std::memcpy(&bits, &values, sizeof bits);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
#elif defined(__AVX2__)
  __m256i bits;
  std::memcpy(&bits, &values, sizeof bits);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
#else
  store(to, values);
#endif
}

// Such stores are not ordered with others: without a fence, another thread could see later stores before them.
inline void end_stores_past_caches() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// dX of one sample after the other.
template <typename S, typename A>
class FeaturesGrad {
 public:
  FeaturesGrad(const FeatureMap<S>& grad, const FeaturesGradInput<A>& in)
      : grad_(grad), in_(in), attended_(grad.channels), mean_(grad.channels), mean_map_(grad.positions),
        past_caches_(past_caches()) {}

  void run(int64_t sample) {
    const int64_t channels = grad_.channels, positions = grad_.positions;
    to_ = grad_.data + sample * grad_.sample_stride;
    channel_attention_ = in_.channel_attention + sample * channels;
    rows_ = in_.rows + sample * channels;
    peak_position_ = in_.peak_position + sample * channels;
    grad_peak_ = in_.grad_peak + sample * channels;
    spatial_attention_ = in_.spatial_attention + sample * positions;
    adversary_map_ = in_.grad_adversary_map + sample * positions;
    for (int64_t c = 0; c < channels; ++c) {
      const A attended = in_.grad_attended[sample * channels + c] * channel_attention_[c];
      attended_.get()[c] = attended / static_cast<A>(positions);
      mean_.get()[c] = in_.grad_mean[sample * channels + c] / static_cast<A>(positions);
    }
    for (int64_t p = 0; p < positions; ++p) {
      mean_map_.get()[p] = in_.grad_mean_map[sample * positions + p] / static_cast<A>(channels);
    }
    if (grad_.channel_stride == 1 && channels > 1) {
      // Of half precision only one walk: equal ones would be folded into a function that is not inlined, 8 % slower.
      if constexpr (std::is_same_v<S, A>) {
        past_caches_ ? all_across<true>() : all_across<false>();
      } else {
        all_across<false>();
      }
    } else {
      int64_t p = 0;
      for (; p + (kVectors - 1) * kWidth<A> < positions; p += kVectors * kWidth<A>) along<kVectors>(p);
      for (; p < positions; p += kWidth<A>) along<1>(p);
    }
    const int64_t map = sample * positions;
    for (int64_t p = 0; p < positions; ++p) peak_of(p, in_.peak_channel[map + p], in_.grad_peak_map[map + p]);
  }

 private:
  // Where a vector begins so as to end within `size`, if that is as long as a vector.
  static int64_t within(int64_t at, int64_t size) { return std::max<int64_t>(0, std::min(at, size - kWidth<A>)); }

  template <bool kPast>
  void all_across() const {
    int64_t p = 0;
    for (; p + kVectors <= grad_.positions; p += kVectors) across<kVectors, kPast>(p);
    for (; p < grad_.positions; ++p) across<1, kPast>(p);
  }

  // Whether dX is written to memory by whole vectors: more than caches hold need not be read into them first.
  bool past_caches() const {
    constexpr int64_t kCaches = 16 << 20;
    const auto whole = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(S)) % kVectorBytes == 0; };
    return std::is_same_v<S, A> && reinterpret_cast<uintptr_t>(grad_.data) % kVectorBytes == 0 &&
           whole(grad_.channels) && whole(grad_.position_stride) && whole(grad_.sample_stride) &&
           grad_.batch * grad_.sample_stride * static_cast<int64_t>(sizeof(S)) > kCaches;
  }

  // V vectors of adjacent positions in every channel.
  template <int V>
  void along(int64_t position) const {
    const int64_t positions = grad_.positions;
    int64_t offsets[V];
    Vector<A> spatial_attention[V], mean_map[V], adversary_map[V];
    Indices<A> index[V];
    for (int v = 0; v < V; ++v) {
      offsets[v] = within(position + v * kWidth<A>, positions);
      spatial_attention[v] = load_up_to<A>(spatial_attention_ + offsets[v], positions);
      mean_map[v] = load_up_to<A>(mean_map_.get() + offsets[v], positions);
      adversary_map[v] = load_up_to<A>(adversary_map_ + offsets[v], positions);
      index[v] = broadcast_index<A>(offsets[v]) + iota<A>();
    }
    for (int64_t c = 0; c < grad_.channels; ++c) {
      S* to = to_ + c * grad_.channel_stride;
      const Vector<A> attended = broadcast(attended_.get()[c]), mean = broadcast(mean_.get()[c]);
      const Vector<A> channel_attention = broadcast(channel_attention_[c]), row = broadcast(rows_[c]);
      const Vector<A> peak = broadcast(grad_peak_[c]);
      const Indices<A> at = broadcast_index<A>(peak_position_[c]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vector<A> value = grad_feature<Vector<A>>(
            attended, channel_attention, row, mean, spatial_attention[v], mean_map[v], adversary_map[v]);
        store_up_to<A>(to + offsets[v], index[v] == at ? value + peak : value, positions);
      }
    }
  }

  // All channels of R positions. `kPast`: see past_caches.
  template <int R, bool kPast>
  void across(int64_t position) const {
    Vector<A> spatial_attention[R], mean_map[R], adversary_map[R];
    for (int r = 0; r < R; ++r) {
      spatial_attention[r] = broadcast(spatial_attention_[position + r]);
      mean_map[r] = broadcast(mean_map_.get()[position + r]);
      adversary_map[r] = broadcast(adversary_map_[position + r]);
    }
    const int64_t channels = grad_.channels;
    for (int64_t c = 0; c < channels; c += kWidth<A>) {
      const int64_t at = within(c, channels);
      const Vector<A> attended = load_up_to<A>(attended_.get() + at, channels);
      const Vector<A> mean = load_up_to<A>(mean_.get() + at, channels);
      const Vector<A> channel_attention = load_up_to<A>(channel_attention_ + at, channels);
      const Vector<A> row = load_up_to<A>(rows_ + at, channels), peak = load_up_to<A>(grad_peak_ + at, channels);
      const Indices<A> peak_position = load_positions(peak_position_ + at, channels);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vector<A> value = grad_feature<Vector<A>>(
            attended, channel_attention, row, mean, spatial_attention[r], mean_map[r], adversary_map[r]);
        const Indices<A> is_peak = peak_position == broadcast_index<A>(position + r);
        S* to = to_ + (position + r) * grad_.position_stride + at;
        const Vector<A> whole = is_peak ? value + peak : value;
        if constexpr (kPast) {
          store_past_caches(to, whole);
        } else {
          store_up_to<A>(to, whole, channels);
        }
      }
    }
  }

  static Indices<A> load_positions(const int32_t* from, int64_t count) {
    using Narrow = Vector<int32_t, static_cast<int>(kWidth<A> * sizeof(int32_t))>;
    if (count >= kWidth<A>) return __builtin_convertvector(load_bits<Narrow>(from), Indices<A>);
    Narrow some = {};
    std::memcpy(&some, from, static_cast<size_t>(count) * sizeof(int32_t));
    return __builtin_convertvector(some, Indices<A>);
  }

  // The element with the maximum over the channels again, all of it: a sum in half precision would be rounded twice.
  void peak_of(int64_t p, int64_t c, A peak_map) const {
    A value = grad_feature(
        attended_.get()[c], channel_attention_[c], rows_[c], mean_.get()[c], spatial_attention_[p],
        mean_map_.get()[p], adversary_map_[p]);
    if (peak_position_[c] == p) value += grad_peak_[c];
    value += peak_map * channel_attention_[c];
    store_some_as<S, A>(to_ + c * grad_.channel_stride + p * grad_.position_stride, broadcast(value), 1);
  }

  const FeatureMap<S>& grad_;
  const FeaturesGradInput<A>& in_;
  Scratch<A> attended_, mean_;  // (C,) d_attended A_C / P, d_mean / P
  Scratch<A> mean_map_;         // (P,) d_mean_map / C
  const bool past_caches_;
  S* to_ = nullptr;
  const A *channel_attention_ = nullptr, *rows_ = nullptr, *grad_peak_ = nullptr;
  const int32_t* peak_position_ = nullptr;
  const A *spatial_attention_ = nullptr, *adversary_map_ = nullptr;
};

}  // namespace

template <typename S, typename A>
void head_attend_backward(
    const FeatureMap<const S>& features, const AttendInput<A>& in, const Attended<const A>& saved,
    const AttendedGrad<A>& grad, const AttendInputGrad<A>& out, const SpatialGradients<A>& parts, int64_t first,
    int64_t last) {
  const int64_t channels = features.channels, positions = features.positions, hidden = in.weights.hidden;
  Scratch<A> weights(channels), grad_spatial(positions);
  SpatialAttention<A> attention(in.weights, positions);
  ChannelGradients<A> sums(channels, positions);
  for (int64_t b = first; b < last; ++b) {
    const Sample<S> x(features, b);
    const int64_t row = b * channels, map = b * positions;
    const A *g = saved.mean_map + map, *spatial = saved.spatial_attention + map;
    const A *channel_attention = in.channel_attention + row, *grad_attended = grad.attended + row;
    for (int64_t c = 0; c < channels; ++c) {
      weights.get()[c] = grad_attended[c] * channel_attention[c] / static_cast<A>(positions);
    }
    PositionSums<A, false>({weights.get(), grad_spatial.get(), nullptr, nullptr, nullptr, nullptr}).run(x);
    A *mean_map = out.mean_map + map, *peak_map = out.peak_map + map, *adversary_map = out.adversary_map + map;
    const bool labelled = in.labels[b] >= 0;
    for (int64_t p = 0; p < positions; ++p) {
      AdversaryGrad<A> term = {};
      if (labelled) term = adversary_term_backward(g[p] * spatial[p], saved.adversary_map[map + p], grad.loss[b]);
      grad_spatial.get()[p] += grad.spatial_attention[map + p] + term.refined * g[p];
      mean_map[p] = term.refined * spatial[p];
      adversary_map[p] = term.adversary;
    }
    attention.backward(g, saved.peak_map + map, spatial, grad_spatial.get(), mean_map, peak_map,
                       parts.gates + 3 * map, parts.hidden + 6 * b * hidden);
    sums.begin({spatial, mean_map, adversary_map}, grad_attended, out.channel_attention + row, out.rows + row);
    for_channels<A>(x, false, sums);
    // 0 X is not 0 for every X.
    if (!labelled) std::fill_n(out.rows + row, channels, A(0));
    for (int64_t p = 0; p < positions; ++p) {
      const int64_t c = saved.peak_channel[map + p];
      out.channel_attention[row + c] += peak_map[p] * load_one<A>(x.at(c, p));
    }
  }
}

template <typename A>
void head_weights_backward(
    const Attended<const A>& saved, const SpatialGradients<A>& parts, int64_t batch, int64_t positions, int64_t hidden,
    const AttendInputGrad<A>& out, int64_t first, int64_t last) {
  const int64_t width = last - first;
  for (int64_t k = 0; k < hidden; ++k) {
    std::fill_n(out.ws1 + k * positions + first, width, A(0));
    std::fill_n(out.ws3 + k * positions + first, width, A(0));
  }
  std::fill_n(out.ws2 + first * hidden, width * hidden, A(0));
  std::fill_n(out.ws4 + first * hidden, width * hidden, A(0));
  for (int64_t b = 0; b < batch; ++b) {
    const A *g = saved.mean_map + b * positions + first, *m = saved.peak_map + b * positions + first;
    const A *units = parts.hidden + 6 * b * hidden, *grad_units = units + 3 * hidden;
    const A* grad_gates = parts.gates + 3 * b * positions;
    for (int64_t k = 0; k < hidden; ++k) {
      add_multiple(width, grad_units[k], g, out.ws1 + k * positions + first);
      add_multiple(width, grad_units[hidden + k], m, out.ws1 + k * positions + first);
      add_multiple(width, grad_units[2 * hidden + k], g, out.ws3 + k * positions + first);
    }
    for (int64_t p = first; p < last; ++p) {
      add_multiple(hidden, grad_gates[p], units, out.ws2 + p * hidden);
      add_multiple(hidden, grad_gates[positions + p], units + hidden, out.ws2 + p * hidden);
      add_multiple(hidden, grad_gates[2 * positions + p], units + 2 * hidden, out.ws4 + p * hidden);
    }
  }
}

template <typename A>
void head_logits_backward(const A* gate, const A* more, A* grad, int64_t size) {
  for (int64_t i = 0; more != nullptr && i < size; ++i) grad[i] += more[i];
  for (int64_t i = 0; i < size; ++i) grad[i] *= sigmoid_backward(gate[i]);
}

template <typename S, typename A>
void head_features_backward(const FeatureMap<S>& grad, const FeaturesGradInput<A>& in, int64_t first, int64_t last) {
  FeaturesGrad<S, A> features(grad, in);
  for (int64_t b = first; b < last; ++b) features.run(b);
  end_stores_past_caches();
}

#define DAN_FAST_INSTANTIATE(S, A)                                                                         \
  template void head_attend_backward<S, A>(                                                                \
      const FeatureMap<const S>&, const AttendInput<A>&, const Attended<const A>&, const AttendedGrad<A>&,          \
      const AttendInputGrad<A>&, const SpatialGradients<A>&, int64_t, int64_t);                            \
  template void head_features_backward<S, A>(const FeatureMap<S>&, const FeaturesGradInput<A>&, int64_t, int64_t);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)
#define DAN_FAST_INSTANTIATE_WEIGHTS(A)                                                             \
  template void head_logits_backward<A>(const A*, const A*, A*, int64_t);                          \
  template void head_weights_backward<A>(                                                          \
      const Attended<const A>&, const SpatialGradients<A>&, int64_t, int64_t, int64_t,             \
      const AttendInputGrad<A>&, int64_t, int64_t);
DAN_FAST_INSTANTIATE_WEIGHTS(double)
DAN_FAST_INSTANTIATE_WEIGHTS(float)

}  // namespace dan_fast::DAN_FAST_ISA
