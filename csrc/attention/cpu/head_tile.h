// What the CPU kernels of the attention head walk a sample with. As internal to an instruction set as
// ../../cpu/vector.h.
//
// The lanes of a vector hold adjacent numbers, whether the sum runs along them or across them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../../cpu/tile.h"
#include "../rules.h"
#include "head_passes.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Vectors in flight.
constexpr int kVectors = kRegisters == 32 ? 4 : 2;

// How far ahead of the current element memory is prefetched. Compilers and CPUs predict little of a walk over rows of a
// few kilobytes, several at a time, and a pass with much to do for each line keeps too few requests in flight itself.
constexpr int64_t kAheadBytes = 1 << 16;

inline void prefetch_ahead(const void* from, int64_t bytes) {
  const char* line = static_cast<const char*>(from) + kAheadBytes;
  for (const char* end = line + bytes; line < end; line += 64) __builtin_prefetch(line, 0, 2);
}

template <typename A>
using IndexOf = std::conditional_t<sizeof(A) == sizeof(int64_t), int64_t, int32_t>;
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

// Compilers would rather load a vector again for each use of it than keep it.
template <typename V>
inline V loaded_once(V vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#elif defined(__SSE2__)
  asm("" : "+x"(vector));
#endif
  return vector;
}

// As takes_the_lead of ../rules.h, in lanes.
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
  return add_halves<kLanes<A>>(lanes);
}

template <typename A>
inline void add_multiple(int64_t size, A factor, const A* __restrict from, A* __restrict to) {
  for (int64_t i = 0; i < size; ++i) to[i] += factor * from[i];
}

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
