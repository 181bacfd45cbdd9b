#include "head_cpu_columns.h"
#include "head_cpu_spatial.h"
#include "head_cpu_tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Mean and first maximum of every channel of a sample.
template <typename A>
class ChannelPool {
 public:
  ChannelPool(int64_t positions, A* mean, A* peak, int32_t* peak_position)
      : positions_(positions), mean_(mean), peak_(peak), peak_position_(peak_position) {}

  void begin() {
    std::fill_n(totals_, kVectors, Vector<A>{});
    std::fill_n(best_, kVectors, broadcast(-std::numeric_limits<A>::infinity()));
    std::fill_n(lead_, kVectors, Indices<A>{});
  }

  template <typename T>
  void add(const T* tile, int64_t stride, int64_t position, int64_t positions) {
    Vector<A> sums[kVectors] = {}, best[kVectors];
    Indices<A> lead[kVectors];
    std::copy_n(best_, kVectors, best);
    std::copy_n(lead_, kVectors, lead);
    for (int64_t p = 0; p < positions; ++p, tile += stride) {
      const Indices<A> index = broadcast_index<A>(position + p);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vector<A> x = load_as<A>(tile + v * kWidth<A>);
        sums[v] = sums[v] + x;
        const Indices<A> leads = lanes_that_lead<A>(x, best[v]);
        best[v] = leads ? x : best[v];
        lead[v] = leads ? index : lead[v];
      }
    }
    for (int v = 0; v < kVectors; ++v) totals_[v] = totals_[v] + sums[v];
    std::copy_n(best, kVectors, best_);
    std::copy_n(lead, kVectors, lead_);
  }

  void end(int64_t channel, int64_t channels) {
    const Vector<A> positions = broadcast(static_cast<A>(positions_));
    for (int64_t c = 0, v = 0; c < channels; c += kWidth<A>, ++v) {
      store_up_to<A>(mean_ + channel + c, totals_[v] / positions, channels - c);
      store_up_to<A>(peak_ + channel + c, best_[v], channels - c);
      const int64_t count = std::min(kWidth<A>, channels - c);
      for (int64_t i = 0; i < count; ++i) peak_position_[channel + c + i] = static_cast<int32_t>(lead_[v][i]);
    }
  }

 private:
  const int64_t positions_;
  A* mean_;
  A* peak_;
  int32_t* peak_position_;
  Vector<A> totals_[kVectors], best_[kVectors];
  Indices<A> lead_[kVectors];
};

// A_C,c * mean over p of X_cp A_S,p.
template <typename A>
class AttendedSums : public ChannelSums<A, 1> {
 public:
  AttendedSums(int64_t positions, const A* spatial_attention, const A* channel_attention, A* attended)
      : ChannelSums<A, 1>({spatial_attention}), positions_(positions), channel_attention_(channel_attention),
        attended_(attended) {}

  void end(int64_t channel, int64_t channels) {
    const Vector<A> positions = broadcast(static_cast<A>(positions_));
    for (int64_t c = 0, v = 0; c < channels; c += kWidth<A>, ++v) {
      const Vector<A> attention = load_up_to<A>(channel_attention_ + channel + c, channels - c);
      store_up_to<A>(attended_ + channel + c, attention * (this->total(0, v) / positions), channels - c);
    }
  }

 private:
  const int64_t positions_;
  const A* channel_attention_;
  A* attended_;
};

}  // namespace

template <typename S, typename A>
void head_pool(const FeatureMap<const S>& features, const Pooled<A>& out, int64_t first, int64_t last) {
  Scratch<A> tile(kTileChannels<A> * kTilePositions);
  for (int64_t b = first; b < last; ++b) {
    const Sample<S> x(features, b);
    const int64_t at = b * x.channels;
    ChannelPool<A> pool(x.positions, out.mean + at, out.peak + at, out.peak_position + at);
    for_channels<A>(x, tile.numbers, pool);
  }
}

template <typename S, typename A>
void head_attend(
    const FeatureMap<const S>& features, const AttendInput<A>& in, const Attended<A>& out, int64_t first,
    int64_t last) {
  Scratch<A> tile(kTileChannels<A> * kTilePositions);
  SpatialAttention<A> attention(in.weights, features.positions);
  for (int64_t b = first; b < last; ++b) {
    const Sample<S> x(features, b);
    const A* channel_attention = in.channel_attention + b * x.channels;
    const int64_t at = b * x.positions;
    A *g = out.mean_map + at, *adversary_map = out.adversary_map + at, *spatial = out.spatial_attention + at;
    PositionSums<A, true>({channel_attention, g, in.rows + b * x.channels, adversary_map, out.peak_map + at,
                           out.peak_channel + at})
        .run(x);
    for (int64_t p = 0; p < x.positions; ++p) g[p] /= static_cast<A>(x.channels);
    attention.forward(g, out.peak_map + at, spatial);
    A loss = 0;
    for (int64_t p = 0; in.labels[b] >= 0 && p < x.positions; ++p) {
      loss += adversary_term(g[p] * spatial[p], adversary_map[p]);
    }
    out.loss[b] = loss;
    AttendedSums<A> sums(x.positions, spatial, channel_attention, out.attended + b * x.channels);
    for_channels<A>(x, tile.numbers, sums);
  }
}

#define DAN_FAST_INSTANTIATE(S, A)                                                                             \
  template void head_pool<S, A>(const FeatureMap<const S>&, const Pooled<A>&, int64_t, int64_t);               \
  template void head_attend<S, A>(                                                                             \
      const FeatureMap<const S>&, const AttendInput<A>&, const Attended<A>&, int64_t, int64_t);
DAN_FAST_INSTANTIATE(double, double)
DAN_FAST_INSTANTIATE(float, float)
DAN_FAST_INSTANTIATE(BFloat16, float)
DAN_FAST_INSTANTIATE(Float16, float)

}  // namespace dan_fast::DAN_FAST_ISA
