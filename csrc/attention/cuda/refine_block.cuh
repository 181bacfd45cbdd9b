// What the CUDA kernels of refine.h share: a block takes kMapChannels channels of a sample, some positions at a time,
// in the order in which they lie, and adds up what it sees both ways by way of shared memory. Each element of a map is
// read, and written, once.
//
// Why tiles of 64 x 64: 64 x 2048 x 7 x 7 makes 2048 blocks of 17 KB, enough for any GPU, and the sums that they leave
// for others to add up are a 64th of the map.
#pragma once

#include "head_tile.cuh"
#include "refine_launch.h"

namespace dan_fast {

constexpr int kMapThreads = 256, kMapSide = static_cast<int>(kMapChannels), kMapPositions = kMapSide;

// Of a row in shared memory: four neighbouring threads a row, in eight rows, read 32 different banks.
constexpr int kMapPitch = kMapSide + 4;

// Threads that share a row, or a column, of a tile.
constexpr int kMapShares = kMapThreads / kMapSide;
static_assert(kMapShares == 4 && kLanes % kMapShares == 0, "as the pitch wants it");

// Blocks of channels, those of a sample next to each other.
__device__ __forceinline__ TileBox map_box(int64_t block, int64_t channels) {
  const int64_t parts = map_parts(channels), first = block % parts * kMapChannels;
  return {block / parts, first, 0, static_cast<int>(smaller(kMapChannels, channels - first)), 0};
}

// body(box) for the positions of a block's channels, some at a time.
template <typename Body>
__device__ __forceinline__ void for_boxes(TileBox box, int64_t positions, const Body& body) {
  for (; box.first_position < positions; box.first_position += kMapPositions) {
    box.positions = static_cast<int>(smaller<int64_t>(kMapPositions, positions - box.first_position));
    body(box);
  }
}

// A box as rows of adjacent numbers: its channels, or, channels_last, its positions.
template <typename S, bool kChannelsLast>
struct BoxRows {
  S* data;
  int64_t stride;

  __device__ BoxRows(const FeatureMap<S>& map, const TileBox& box)
      : data(map.data + box.sample * map.sample_stride + box.first_channel * map.channel_stride +
             box.first_position * map.position_stride),
        stride(kChannelsLast ? map.position_stride : map.channel_stride) {}

  __device__ __forceinline__ S* at(int row, int column) const { return data + row * stride + column; }
};

// Whether all maps have their numbers in whole packs: in every row, or in all rows together where they are one run.
template <typename S, typename... Rows>
__device__ __forceinline__ bool in_packs(int rows, int columns, const Rows&... maps) {
  constexpr int kCount = kPack<S>;
  if ((... || (reinterpret_cast<uintptr_t>(maps.data) % 16 != 0))) return false;
  const bool in_rows = columns % kCount == 0 && (... && (maps.stride % kCount == 0));
  return in_rows || (rows * columns % kCount == 0 && (... && (maps.stride == columns)));
}

template <int kCount, typename S>
__device__ __forceinline__ void load_numbers(const S* from, S (&numbers)[kCount]) {
  if constexpr (kCount == 1) {
    numbers[0] = *from;
  } else {
    const Pack<S, kCount> pack = load_pack<S, kCount>(from);
#pragma unroll
    for (int k = 0; k < kCount; ++k) numbers[k] = pack.values[k];
  }
}

template <int kCount, typename S>
__device__ __forceinline__ void store_numbers(S* to, const S (&numbers)[kCount]) {
  if constexpr (kCount == 1) {
    *to = numbers[0];
  } else {
    Pack<S, kCount> pack;
#pragma unroll
    for (int k = 0; k < kCount; ++k) pack.values[k] = numbers[k];
    *reinterpret_cast<Pack<S, kCount>*>(to) = pack;
  }
}

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// visit(Count, row, column) for this thread's runs of so many numbers, which may go on in the next row.
template <int kCount, typename Visit>
__device__ __forceinline__ void for_runs(int rows, int columns, const Visit& visit) {
  const int runs = rows * columns / kCount;
  // Two runs in flight, but for those of eight numbers, which registers would not hold.
#pragma unroll (kCount > 4 ? 1 : 2)
  for (int i = static_cast<int>(threadIdx.x); i < runs; i += kMapThreads) {
    const int at = i * kCount, row = at / columns;
    visit(Count<kCount>{}, row, at - row * columns);
  }
}

// In runs of 16 bytes where all maps have them.
template <typename S, typename Visit>
__device__ __forceinline__ void for_numbers(bool packed, int rows, int columns, const Visit& visit) {
  if (packed) {
    for_runs<kPack<S>>(rows, columns, visit);
  } else {
    for_runs<1>(rows, columns, visit);
  }
}

// each(k, row, column) for the numbers of a run.
template <int kCount, typename Each>
__device__ __forceinline__ void for_each_of(int row, int column, int columns, const Each& each) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    each(k, row, column);
    if (++column == columns) {
      column = 0;
      ++row;
    }
  }
}

// Weights of a box's channels and positions.
template <typename A>
struct MapWeights {
  A by_channel[kMapSide], by_position[kMapSide];
};

// And for sums: terms of its elements in rows; what threads hand on.
template <typename A>
struct MapShared : MapWeights<A> {
  A terms[kMapSide * kMapPitch];
  A handed[kMapThreads];
};

// This thread's share of the sum over the terms of a row, and of a column, times the weights of the others.
template <typename A>
__device__ __forceinline__ A row_share(const MapShared<A>& shared, const A* weights, int rows, int columns) {
  const int row = static_cast<int>(threadIdx.x) / kMapShares;
  A sum = A(0);
  if (row >= rows) return sum;
  for (int c = static_cast<int>(threadIdx.x) % kMapShares; c < columns; c += kMapShares) {
    sum += shared.terms[row * kMapPitch + c] * weights[c];
  }
  return sum;
}

template <typename A>
__device__ __forceinline__ A column_share(const MapShared<A>& shared, const A* weights, int rows, int columns) {
  const int column = static_cast<int>(threadIdx.x) % kMapSide;
  A sum = A(0);
  if (column >= columns) return sum;
  for (int r = static_cast<int>(threadIdx.x) / kMapSide; r < rows; r += kMapShares) {
    sum += shared.terms[r * kMapPitch + column] * weights[r];
  }
  return sum;
}

// The total of the shares to done(row or column, total), once each; all threads of the block take part.
template <bool kOfRows, typename A, typename Done>
__device__ __forceinline__ void add_shares(MapShared<A>& shared, A share, int size, const Done& done) {
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kOfRows) {
#pragma unroll
    for (int step = kMapShares / 2; step > 0; step /= 2) share += __shfl_xor_sync(kAllLanes, share, step);
    if (thread % kMapShares == 0 && thread / kMapShares < size) done(thread / kMapShares, share);
  } else {
    shared.handed[thread] = share;
    __syncthreads();
    if (thread < size) {
      for (int other = thread + kMapSide; other < kMapThreads; other += kMapSide) share += shared.handed[other];
      done(thread, share);
    }
  }
}

// Over a box's positions for its channels, over its channels for its positions.
template <bool kChannelsLast, typename A>
__device__ __forceinline__ A channel_share(const MapShared<A>& shared, const TileBox& box) {
  return kChannelsLast ? column_share(shared, shared.by_position, box.positions, box.channels)
                       : row_share(shared, shared.by_position, box.channels, box.positions);
}

template <bool kChannelsLast, typename A>
__device__ __forceinline__ A position_share(const MapShared<A>& shared, const TileBox& box) {
  return kChannelsLast ? row_share(shared, shared.by_channel, box.positions, box.channels)
                       : column_share(shared, shared.by_channel, box.channels, box.positions);
}

}  // namespace dan_fast
