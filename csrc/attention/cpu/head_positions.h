// Sums over the positions of every channel of a sample on the CPU. As internal to an instruction set as
// head_tile.h.
#pragma once

#include "head_rows.h"
#include "head_tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

template <typename A>
constexpr int64_t kTileChannels = kVectors * kWidth<A>;

// Positions added up one after the other before they join a total.
constexpr int64_t kRun = 8;

// Some channels of a sample whose channels are adjacent, kTileChannels apart; those that it lacks hold anything finite
// or not.
template <typename A, typename S>
void copy_tile(const Sample<S>& x, int64_t channel, int64_t channels, int64_t position, int64_t positions, A* tile) {
  for (int64_t p = 0; p < positions; ++p) {
    const S* from = x.at(channel, position + p);
    for (int64_t c = 0; c < channels; c += kWidth<A>) {
      store(tile + p * kTileChannels<A> + c, load_up_to<A>(from + c, channels - c));
    }
  }
}

// Calls reduction.add(tile, stride, channel, position, positions) for each tile's worth of adjacent channels, kRun
// positions at a time and in their order; `first`: the sample is not in the cache yet.
template <typename A, typename S, typename Reduction>
void for_adjacent_channels(const Sample<S>& x, bool first, Reduction& reduction) {
  const int64_t whole = x.channels / kTileChannels<A> * kTileChannels<A>, rest = x.channels - whole;
  alignas(kVectorBytes) A tile[kTileChannels<A> * kRun];
  // As the rows lie.
  for (int64_t position = 0; position < x.positions; position += kRun) {
    const int64_t positions = std::min(kRun, x.positions - position);
    for (int64_t channel = 0; channel < whole; channel += kTileChannels<A>) {
      for (int64_t p = 0; first && p < positions; ++p) {
        prefetch_ahead(x.at(channel, position + p), kTileChannels<A> * static_cast<int64_t>(sizeof(S)));
      }
      reduction.add(x.at(channel, position), x.position_stride, channel, position, positions);
    }
    if (rest == 0) continue;
    copy_tile<A>(x, whole, rest, position, positions, tile);
    reduction.add(static_cast<const A*>(tile), kTileChannels<A>, whole, position, positions);
  }
}

// Calls reduction.add_rows(rows, channel) for each vector's worth of channels whose positions are adjacent,
// kRowPositions at a time and in their order.
template <typename A, typename S, typename Reduction>
void for_adjacent_positions(const Sample<S>& x, bool first, Reduction& reduction) {
  int64_t offsets[kWidth<A>];
  for (int64_t channel = 0; channel < x.channels; channel += kWidth<A>) {
    if (channel == 0 || channel + kWidth<A> > x.channels) {
      const int64_t last = x.channels - 1 - channel;
      for (int i = 0; i < kWidth<A>; ++i) offsets[i] = std::min<int64_t>(row_of<A>(i), last) * x.channel_stride;
    }
    for (int64_t position = 0; position < x.positions; position += kRowPositions<A>) {
      const Rows<A, S> rows(x, channel, offsets, position);
      // Rows that touch share cache lines: prefetched one by one, those would be requested twice.
      const int64_t bytes = rows.positions * static_cast<int64_t>(sizeof(S));
      const bool touching = x.channel_stride == rows.positions;
      if (first && touching) prefetch_ahead(x.at(channel, position), kWidth<A> * bytes);
      for (int64_t r = 0; first && !touching && r < kWidth<A>; ++r) prefetch_ahead(rows.from[r], bytes);
      reduction.add_rows(rows, channel);
    }
  }
}

// After all of that calls reduction.end(channel, channels).
template <typename A, typename S, typename Reduction>
void for_channels(const Sample<S>& x, bool first, Reduction& reduction) {
  if (x.channels_adjacent()) {
    for_adjacent_channels<A>(x, first, reduction);
  } else {
    for_adjacent_positions<A>(x, first, reduction);
  }
  for (int64_t channel = 0; channel < x.channels; channel += kTileChannels<A>) {
    reduction.end(channel, std::min(kTileChannels<A>, x.channels - channel));
  }
}

// K weighted sums over the positions of every channel.
template <typename A, int K>
class ChannelSums {
 public:
  ChannelSums(int64_t channels, int64_t positions)
      : size_(round_up(channels, kTileChannels<A>)), positions_(positions), padded_(round_up(positions, kLanes<A>)),
        weights_(K * padded_), totals_(K * size_) {
    std::fill_n(weights_.get(), K * padded_, A(0));
  }

  // weights[k] (P,)
  void begin(const A* const (&weights)[K]) {
    for (int k = 0; k < K; ++k) std::copy_n(weights[k], positions_, weights_.get() + k * padded_);
    std::fill_n(totals_.get(), K * size_, A(0));
  }

  template <typename T>
  void add(const T* tile, int64_t stride, int64_t channel, int64_t position, int64_t positions) {
    Vector<A> sums[K][kVectors] = {};
    for (int64_t p = 0; p < positions; ++p, tile += stride) {
      Vector<A> weights[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) weights[k] = broadcast(weights_.get()[k * padded_ + position + p]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vector<A> x = load_as<A>(tile + v * kWidth<A>);
        if constexpr (K > 1) x = loaded_once(x);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) sums[k][v] = sums[k][v] + weights[k] * x;
      }
    }
    for (int k = 0; k < K; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        A* to = totals_.get() + k * size_ + channel + v * kWidth<A>;
        store(to, load(to) + sums[k][v]);
      }
    }
  }

  template <typename S>
  void add_rows(const Rows<A, S>& rows, int64_t channel) {
    constexpr int R = kRowsAtOnce<A>;
    Vector<A> groups[K][kRowGroups<A>];
#pragma GCC unroll 4
    for (int group = 0; group < kRowGroups<A>; ++group) {
      Vector<A> lanes[K][kParts<A>][R] = {};
#pragma GCC unroll 4
      for (int part = 0; part < kParts<A>; ++part) {
        rows.walk(group * R, part, [&](int64_t p, const Vector<A>(&x)[R], const auto& counted) {
          Vector<A> weights[K];
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) weights[k] = load(weights_.get() + k * padded_ + rows.position + p);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const Vector<A> values = counted(x[r], Vector<A>{});
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) lanes[k][part][r] = lanes[k][part][r] + weights[k] * values;
          }
        });
      }
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) groups[k][group] = fold_rows<A>(lanes[k], Add());
    }
    Vector<A> sums[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) sums[k] = fold_groups<A>(groups[k], Add());
    for (int64_t p = rows.along; p < rows.positions; ++p) {
      const Vector<A> x = rows.column(p);
      for (int k = 0; k < K; ++k) {
        sums[k] = sums[k] + broadcast(weights_.get()[k * padded_ + rows.position + p]) * x;
      }
    }
    for (int k = 0; k < K; ++k) {
      A* to = totals_.get() + k * size_ + channel;
      store(to, load(to) + sums[k]);
    }
  }

 protected:
  Vector<A> total(int k, int64_t channel) const { return load(totals_.get() + k * size_ + channel); }

 private:
  const int64_t size_, positions_, padded_;
  Scratch<A> weights_;  // (K, P), with zeros up to whole vectors
  Scratch<A> totals_;   // (K, C)
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
