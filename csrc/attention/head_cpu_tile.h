// How the CPU kernels of the attention head walk a sample. For head_cpu*_isa.cpp only: everything has internal
// linkage, so that no instruction set gets another's code.
//
// A sum over the positions of a channel has the channels in the lanes of a vector: a sample whose positions are
// adjacent is turned in the first-level cache, a tile at a time. A sum over the channels of a position has in the lanes
// whatever is adjacent.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../memory/stream_tile.h"
#include "../memory/stream_vector.h"
#include "head_cpu.h"
#include "head_rules.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Partial sums of one total, the same number in every instruction set.
template <typename A>
constexpr int64_t kLanes = 64 / static_cast<int64_t>(sizeof(A));

// Vectors in flight.
constexpr int kVectors = kRegisters == 32 ? 4 : 2;

template <typename A>
constexpr int64_t kTileChannels = kVectors * kWidth<A>;
constexpr int64_t kTilePositions = 64;

// Positions added up one after the other before they join a total.
constexpr int64_t kRun = 8;

// How far ahead of the element at hand memory is asked for. Compilers and CPUs foresee little of a walk over rows of a
// few kilobytes, several at a time, and a pass with much to do for each line keeps too few requests in flight itself.
constexpr int64_t kAheadBytes = 1 << 16;

inline void prefetch_ahead(const void* from, int64_t bytes) {
  const char* line = static_cast<const char*>(from) + kAheadBytes;
  for (const char* end = line + bytes; line < end; line += 64) __builtin_prefetch(line, 0, 2);
}

template <typename A>
using IndexOf = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
template <typename A>
using Indices = Vector<IndexOf<A>>;

template <typename A>
inline Indices<A> broadcast_index(int64_t index) {
  return static_cast<IndexOf<A>>(index) - Indices<A>{};
}

template <typename A>
inline Indices<A> iota() {
  Indices<A> result = {};
  for (int64_t i = 0; i < kWidth<A>; ++i) result[i] = static_cast<IndexOf<A>>(i);
  return result;
}

template <typename S>
struct Sample {
  const S* data;
  int64_t channels, positions, channel_stride, position_stride;

  Sample(const FeatureMap<const S>& map, int64_t index)
      : data(map.data + index * map.sample_stride), channels(map.channels), positions(map.positions),
        channel_stride(map.channel_stride), position_stride(map.position_stride) {}

  const S* at(int64_t channel, int64_t position) const {
    return data + channel * channel_stride + position * position_stride;
  }
  bool channels_adjacent() const { return channel_stride == 1 && channels > 1; }
};

template <typename A, typename S>
inline A load_one(const S* from) {
  return load_some_as<A>(from, 1)[0];
}

template <typename A, typename S>
inline Vector<A> load_up_to(const S* from, int64_t count) {
  return count >= kWidth<A> ? load_as<A>(from) : load_some_as<A>(from, count);
}

template <typename A, typename S>
inline void store_up_to(S* to, Vector<A> values, int64_t count) {
  count >= kWidth<A> ? store_as<S, A>(to, values) : store_some_as<S, A>(to, values, count);
}

// As takes_the_lead of head_rules.h, in lanes.
template <typename A>
inline Indices<A> lanes_that_lead(Vector<A> candidate, Vector<A> best) {
  return ~(candidate <= best) & (best == best);
}

// Sum of a[i] b[i] in kLanes chains.
template <typename A>
inline A dot(const A* __restrict a, const A* __restrict b, int64_t size) {
  A lanes[kLanes<A>] = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>) {
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  for (int64_t lane = 0; i < size; ++i, ++lane) lanes[lane] += a[i] * b[i];
  for (int64_t half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <typename A>
inline void add_multiple(int64_t size, A factor, const A* __restrict from, A* __restrict to) {
  for (int64_t i = 0; i < size; ++i) to[i] += factor * from[i];
}

using Quad = Vector<float, 16>;
using Words4 = Vector<uint32_t, 16>;

inline Quad interleave(Quad a, Quad b, bool low) {
#if defined(__clang__)
  return low ? __builtin_shufflevector(a, b, 0, 4, 1, 5) : __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  return low ? __builtin_shuffle(a, b, Words4{0, 4, 1, 5}) : __builtin_shuffle(a, b, Words4{2, 6, 3, 7});
#endif
}

// to[p * stride + r] = rows[r][p] for four rows.
inline void turn(const float* const* rows, int64_t size, float* to, int64_t stride) {
  int64_t p = 0;
  for (; p + 4 <= size; p += 4, to += 4 * stride) {
    const Quad a = load_bits<Quad>(rows[0] + p), b = load_bits<Quad>(rows[1] + p);
    const Quad c = load_bits<Quad>(rows[2] + p), d = load_bits<Quad>(rows[3] + p);
    const Quad ac_low = interleave(a, c, true), bd_low = interleave(b, d, true);
    const Quad ac_high = interleave(a, c, false), bd_high = interleave(b, d, false);
    const Quad turned[4] = {interleave(ac_low, bd_low, true), interleave(ac_low, bd_low, false),
                            interleave(ac_high, bd_high, true), interleave(ac_high, bd_high, false)};
    for (int64_t i = 0; i < 4; ++i) std::memcpy(to + i * stride, &turned[i], sizeof(Quad));
  }
  for (; p < size; ++p, to += stride) {
    for (int r = 0; r < 4; ++r) to[r] = rows[r][p];
  }
}

inline void turn(const double* const* rows, int64_t size, double* to, int64_t stride) {
  for (int64_t p = 0; p < size; ++p, to += stride) {
    for (int r = 0; r < 4; ++r) to[r] = rows[r][p];
  }
}

// A tile with the channels adjacent, kTileChannels apart; channels that the sample lacks hold anything finite or not.
// Where `ahead`, what comes after the tile is asked for.
template <typename A, typename S>
void copy_tile(const Sample<S>& x, int64_t channel, int64_t channels, int64_t position, int64_t positions, bool ahead,
               A* tile) {
  if (x.channels_adjacent()) {
    for (int64_t p = 0; p < positions; ++p) {
      const S* from = x.at(channel, position + p);
      for (int64_t c = 0; c < channels; c += kWidth<A>) {
        store(tile + p * kTileChannels<A> + c, load_up_to<A>(from + c, channels - c));
      }
    }
    return;
  }
  A wide[std::is_same_v<S, A> ? 1 : 4][kTilePositions];
  for (int64_t c = 0; c < channels; c += 4) {
    for (int64_t r = 0; ahead && r < 4; ++r) {
      prefetch_ahead(x.at(channel + c, position) + r * x.channel_stride, positions * static_cast<int64_t>(sizeof(S)));
    }
    const A* rows[4];
    for (int64_t r = 0; r < 4; ++r) {
      const S* from = x.at(channel + std::min(c + r, channels - 1), position);
      if constexpr (std::is_same_v<S, A>) {
        rows[r] = from;
      } else {
        widen(from, positions, wide[r]);
        rows[r] = wide[r];
      }
    }
    turn(rows, positions, tile + c, kTileChannels<A>);
  }
}

// Calls for each tile's worth of channels reduction.add(tile, stride, channel, position, positions), kRun positions at
// a time and in their order, and at last reduction.end(channel, channels). `first`: nobody has just read the sample.
template <typename A, typename S, typename Reduction>
void for_channels(const Sample<S>& x, bool first, A* tile, Reduction& reduction) {
  const int64_t whole = x.channels_adjacent() ? x.channels / kTileChannels<A> * kTileChannels<A> : 0;
  // As the rows lie.
  for (int64_t position = 0; whole > 0 && position < x.positions; position += kRun) {
    const int64_t positions = std::min(kRun, x.positions - position);
    for (int64_t channel = 0; channel < whole; channel += kTileChannels<A>) {
      for (int64_t p = 0; first && p < positions; ++p) {
        prefetch_ahead(x.at(channel, position + p), kTileChannels<A> * static_cast<int64_t>(sizeof(S)));
      }
      reduction.add(x.at(channel, position), x.position_stride, channel, position, positions);
    }
  }
  for (int64_t channel = whole; channel < x.channels; channel += kTileChannels<A>) {
    const int64_t channels = std::min(kTileChannels<A>, x.channels - channel);
    for (int64_t position = 0; position < x.positions; position += kTilePositions) {
      const int64_t positions = std::min(kTilePositions, x.positions - position);
      copy_tile(x, channel, channels, position, positions, first, tile);
      for (int64_t p = 0; p < positions; p += kRun) {
        const A* from = tile + p * kTileChannels<A>;
        reduction.add(from, kTileChannels<A>, channel, position + p, std::min(kRun, positions - p));
      }
    }
  }
  for (int64_t channel = 0; channel < x.channels; channel += kTileChannels<A>) {
    reduction.end(channel, std::min(kTileChannels<A>, x.channels - channel));
  }
}

// K weighted sums over the positions of every channel.
template <typename A, int K>
class ChannelSums {
 public:
  explicit ChannelSums(int64_t channels) : size_(round_up(channels, kTileChannels<A>)), totals_(K * size_) {}

  // weights[k] (P,)
  void begin(const A* const (&weights)[K]) {
    std::copy_n(weights, K, weights_);
    std::fill_n(totals_.numbers, K * size_, A(0));
  }

  template <typename T>
  void add(const T* tile, int64_t stride, int64_t channel, int64_t position, int64_t positions) {
    Vector<A> sums[K][kVectors] = {};
    for (int64_t p = 0; p < positions; ++p, tile += stride) {
      Vector<A> weights[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) weights[k] = broadcast(weights_[k][position + p]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vector<A> x = load_as<A>(tile + v * kWidth<A>);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) sums[k][v] = sums[k][v] + weights[k] * x;
      }
    }
    for (int k = 0; k < K; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        A* to = totals_.numbers + k * size_ + channel + v * kWidth<A>;
        store(to, load(to) + sums[k][v]);
      }
    }
  }

 protected:
  Vector<A> total(int k, int64_t channel) const { return load(totals_.numbers + k * size_ + channel); }

 private:
  const int64_t size_;
  const A* weights_[K];
  Scratch<A> totals_;  // (K, C)
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
