#include "head_columns.h"
#include "head_positions.h"
#include "head_spatial.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Mean and first maximum of every channel of one sample after the other.
template <typename A>
class ChannelPool {
 public:
  ChannelPool(int64_t channels, int64_t positions)
      : size_(round_up(channels, kTileChannels<A>)), positions_(positions), totals_(size_), best_(size_),
        lead_(size_) {}

  void begin(A* mean, A* peak, int32_t* peak_position) {
    mean_ = mean;
    peak_ = peak;
    peak_position_ = peak_position;
    has_nan_ = Indices<A>{};
    std::fill_n(totals_.get(), size_, A(0));
    std::fill_n(best_.get(), size_, -std::numeric_limits<A>::infinity());
    std::fill_n(lead_.get(), size_, IndexOf<A>(0));
  }

  template <typename T>
  void add(const T* tile, int64_t stride, int64_t channel, int64_t position, int64_t positions) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = channel + v * kWidth<A>;
      Vector<A> sum = {}, best = load(best_.get() + at);
      Indices<A> lead = load(lead_.get() + at);
      const T* from = tile + v * kWidth<A>;
      for (int64_t p = 0; p < positions; ++p, from += stride) {
        const Vector<A> x = loaded_once(load_as<A>(from));
        sum = sum + x;
        const Indices<A> leads = lanes_that_lead<A>(x, best);
        best = leads ? x : best;
        lead = leads ? broadcast_index<A>(position + p) : lead;
      }
      store(totals_.get() + at, load(totals_.get() + at) + sum);
      store(best_.get() + at, best);
      store(lead_.get() + at, lead);
    }
  }

  // NaN in a row is left to search_again.
  template <typename S>
  void add_rows(const Rows<A, S>& rows, int64_t channel) {
    constexpr int R = kRowsAtOnce<A>;
    const Vector<A> lowest = broadcast(-std::numeric_limits<A>::infinity());
    Vector<A> sums[kRowGroups<A>], tops[kRowGroups<A>];
#pragma GCC unroll 4
    for (int group = 0; group < kRowGroups<A>; ++group) {
      Vector<A> sum[kParts<A>][R] = {}, top[kParts<A>][R];
#pragma GCC unroll 4
      for (int part = 0; part < kParts<A>; ++part) {
        std::fill_n(top[part], R, lowest);
        rows.walk(group * R, part, [&](int64_t, const Vector<A>(&x)[R], const auto& counted) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            sum[part][r] = sum[part][r] + counted(x[r], Vector<A>{});
            top[part][r] = Max()(top[part][r], counted(x[r], lowest));
          }
        });
      }
      sums[group] = fold_rows<A>(sum, Add());
      tops[group] = fold_rows<A>(top, Max());
    }
    Vector<A> total = fold_groups<A>(sums, Add()), top = fold_groups<A>(tops, Max());
    for (int64_t p = rows.along; p < rows.positions; ++p) {
      const Vector<A> x = rows.column(p);
      total = total + x;
      top = Max()(top, x);
    }
    total = load(totals_.get() + channel) + total;
    const Vector<A> best = load(best_.get() + channel);
    const Indices<A> leads = lanes_that_lead<A>(top, best);
    has_nan_ = has_nan_ | (total != total);
    store(totals_.get() + channel, total);
    store(best_.get() + channel, leads ? top : best);
    store(lead_.get() + channel, leads ? first_of(rows, top) : load(lead_.get() + channel));
  }

  // Maxima of the channels whose sum is NaN.
  template <typename S>
  void search_again(const Sample<S>& x) {
    const Indices<A> none = {};
    if (std::memcmp(&has_nan_, &none, sizeof none) == 0) return;
    for (int64_t c = 0; c < x.channels; ++c) {
      if (mean_[c] == mean_[c]) continue;
      peak_[c] = -std::numeric_limits<A>::infinity();
      peak_position_[c] = 0;
      for (int64_t p = 0; p < x.positions; ++p) {
        const A value = load_one<A>(x.at(c, p));
        if (!takes_the_lead(value, peak_[c])) continue;
        peak_[c] = value;
        peak_position_[c] = static_cast<int32_t>(p);
      }
    }
  }

  void end(int64_t channel, int64_t channels) {
    const Vector<A> positions = broadcast(static_cast<A>(positions_));
    for (int64_t c = 0; c < channels; c += kWidth<A>) {
      store_up_to<A>(mean_ + channel + c, load(totals_.get() + channel + c) / positions, channels - c);
    }
    std::copy_n(best_.get() + channel, channels, peak_ + channel);
    for (int64_t c = channel; c < channel + channels; ++c) peak_position_[c] = static_cast<int32_t>(lead_.get()[c]);
  }

 private:
  // Where each channel's `top` is first in its row; any number where it is not.
  template <typename S>
  static Indices<A> first_of(const Rows<A, S>& rows, Vector<A> top) {
    constexpr int R = kRowsAtOnce<A>;
    constexpr int64_t kNone = std::numeric_limits<IndexOf<A>>::max();
    Indices<A> places[kRowGroups<A>];
    A each[kWidth<A>];
    store(each, top);
#pragma GCC unroll 4
    for (int group = 0; group < kRowGroups<A>; ++group) {
      Indices<A> place[kParts<A>][R];
      Vector<A> tops[R];
      for (int r = 0; r < R; ++r) tops[r] = broadcast(each[row_of<A>(group * R + r)]);
#pragma GCC unroll 4
      for (int part = 0; part < kParts<A>; ++part) {
        std::fill_n(place[part], R, broadcast_index<A>(kNone));
        // Lanes beyond a row come after the one that is found.
        rows.template walk<true>(group * R, part, [&](int64_t p, const Vector<A>(&x)[R], const auto&) {
          const Indices<A> index = broadcast_index<A>(rows.position + p) + iota<A>();
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) place[part][r] = x[r] == tops[r] ? index : place[part][r];
        });
      }
      places[group] = fold_rows<IndexOf<A>>(place, Min());
    }
    Indices<A> place = fold_groups<IndexOf<A>>(places, Min());
    for (int64_t p = rows.along; p < rows.positions; ++p) {
      const Indices<A> index = broadcast_index<A>(rows.position + p);
      place = Min()(place, rows.column(p) == top ? index : broadcast_index<A>(kNone));
    }
    return place;
  }

  const int64_t size_, positions_;
  Indices<A> has_nan_ = {};
  A *mean_ = nullptr, *peak_ = nullptr;
  int32_t* peak_position_ = nullptr;
  Scratch<A> totals_, best_;  // (C,)
  Scratch<IndexOf<A>> lead_;  // (C,)
};

// A_C,c * mean over p of X_cp A_S,p.
template <typename A>
class AttendedSums : public ChannelSums<A, 1> {
 public:
  AttendedSums(int64_t channels, int64_t positions) : ChannelSums<A, 1>(channels, positions), positions_(positions) {}

  void begin(const A* spatial_attention, const A* channel_attention, A* attended) {
    ChannelSums<A, 1>::begin({spatial_attention});
    channel_attention_ = channel_attention;
    attended_ = attended;
  }

  void end(int64_t channel, int64_t channels) {
    const Vector<A> positions = broadcast(static_cast<A>(positions_));
    for (int64_t c = 0; c < channels; c += kWidth<A>) {
      const Vector<A> attention = load_up_to<A>(channel_attention_ + channel + c, channels - c);
      store_up_to<A>(attended_ + channel + c, attention * (this->total(0, channel + c) / positions), channels - c);
    }
  }

 private:
  const int64_t positions_;
  const A* channel_attention_ = nullptr;
  A* attended_ = nullptr;
};

}  // namespace

template <typename S, typename A>
void head_pool(const FeatureMap<const S>& features, const Pooled<A>& out, int64_t first, int64_t last) {
  ChannelPool<A> pool(features.channels, features.positions);
  for (int64_t b = first; b < last; ++b) {
    const Sample<S> x(features, b);
    const int64_t at = b * x.channels;
    pool.begin(out.mean + at, out.peak + at, out.peak_position + at);
    for_channels<A>(x, true, pool);
    pool.search_again(x);
  }
}

template <typename S, typename A>
void head_attend(
    const FeatureMap<const S>& features, const AttendInput<A>& in, const Attended<A>& out, int64_t first,
    int64_t last) {
  SpatialAttention<A> attention(in.weights, features.positions);
  AttendedSums<A> sums(features.channels, features.positions);
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
    sums.begin(spatial, channel_attention, out.attended + b * x.channels);
    for_channels<A>(x, false, sums);
  }
}

#define DAN_FAST_INSTANTIATE(S, A)                                                                             \
  template void head_pool<S, A>(const FeatureMap<const S>&, const Pooled<A>&, int64_t, int64_t);               \
  template void head_attend<S, A>(                                                                             \
      const FeatureMap<const S>&, const AttendInput<A>&, const Attended<A>&, int64_t, int64_t);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast::DAN_FAST_ISA
