// A tile of one sample's map in shared memory: some channels by some positions, laid out as the map is. Whatever the
// layout and however the rows are aligned, global memory is read in long runs, and each element once for all passes.
// Of CUDA's headers only what grid.cuh needs.
#pragma once

#include <cstdint>

#include "../../cuda/grid.cuh"
#include "../head.h"
#include "../rules.h"

namespace dan_fast {

template <typename T>
__device__ __forceinline__ T smaller(T a, T b) {
  return b < a ? b : a;
}

// How many channels are read, or written, at once: 16 bytes.
template <typename S>
constexpr int kPack = 16 / static_cast<int>(sizeof(S));

template <typename T, int kCount>
struct alignas(16) Pack {
  T values[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}

// 16 bytes into shared memory, both sides aligned; done when `copies_done` returns.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
#else
  *static_cast<Pack<uint32_t, 4>*>(to) = *static_cast<const Pack<uint32_t, 4>*>(from);
#endif
}

// A barrier of the block too.
__device__ __forceinline__ void copies_done() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncthreads();
}

// Where a tile lies in its sample.
struct TileBox {
  int64_t sample, first_channel, first_position;
  int channels, positions;
};

template <typename S, bool kChannelsLast>
struct Tile {
  S* data;    // shared memory, aligned to 16 bytes
  int pitch;  // from one channel to the next, channels_last: from one position to the next

  __device__ __forceinline__ const S* at(int channel, int position) const {
    return data + (kChannelsLast ? position * pitch + channel : channel * pitch + position);
  }

  // No thread may still read the last tile. Contiguous rows lie together in the tile (pitch = positions),
  // so all channels of whole rows are one run; only its beginning need be aligned.
  __device__ __forceinline__ void load(const FeatureMap<const S>& map, const TileBox& box) const {
    const S* const from = map.data + box.sample * map.sample_stride + box.first_channel * map.channel_stride +
                          box.first_position * map.position_stride;
    const int64_t stride = kChannelsLast ? map.position_stride : map.channel_stride;
    int rows = kChannelsLast ? box.positions : box.channels;
    int columns = kChannelsLast ? box.channels : box.positions;
    if (!kChannelsLast && columns == stride && columns == pitch) {
      columns *= rows;
      rows = 1;
    }
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 &&
                         (rows == 1 || (stride % kPack<S> == 0 && pitch % kPack<S> == 0));
    const int packs = aligned ? columns / kPack<S> : 0;
#pragma unroll 4
    for (int i = thread; i < rows * packs; i += threads) {
      const int row = i / packs, column = (i - row * packs) * kPack<S>;
      copy_16(data + row * pitch + column, from + row * stride + column);
    }
    const int begin = packs * kPack<S>, rest = columns - begin;
#pragma unroll 4
    for (int i = thread; i < rows * rest; i += threads) {
      const int row = i / rest, column = begin + i - row * rest;
      data[row * pitch + column] = from[row * stride + column];
    }
    copies_done();
  }

  // visit(channel, x, its weights) for every `step`-th pack of channels from the `first`-th on, at one position;
  // channels come in order. The weights of channel 0 are aligned to 16 bytes.
  template <typename A, int kWeights, typename Visit>
  __device__ __forceinline__ void visit_channels(
      int channels, int position, int first, int step, const A* const (&weights)[kWeights], const Visit& visit) const {
    constexpr int kCount = kPack<S>;
    int channel = first * kCount;
    for (; channel + kCount <= channels; channel += step * kCount) {
      Pack<S, kCount> x;
      if constexpr (kChannelsLast) {
        x = load_pack<S, kCount>(at(channel, position));
      } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) x.values[k] = *at(channel + k, position);
      }
      Pack<A, kCount> packs[kWeights];
#pragma unroll
      for (int w = 0; w < kWeights; ++w) packs[w] = load_pack<A, kCount>(weights[w] + channel);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        A own[kWeights];
#pragma unroll
        for (int w = 0; w < kWeights; ++w) own[w] = packs[w].values[k];
        visit(channel + k, static_cast<A>(x.values[k]), own);
      }
    }
    for (int end = smaller(channel + kCount, channels); channel < end; ++channel) {
      A own[kWeights];
#pragma unroll
      for (int w = 0; w < kWeights; ++w) own[w] = weights[w][channel];
      visit(channel, static_cast<A>(*at(channel, position)), own);
    }
  }

  // visit(position, x) for every `step`-th position from `first` on, at one channel. Threads that walk neighbouring
  // contiguous rows begin a place further each, or a power of two of positions would put them all on one bank; rows of
  // an odd number of words have the banks to themselves.
  template <typename A, typename Visit>
  __device__ __forceinline__ void visit_positions(
      int channel, int positions, int first, int step, const Visit& visit) const {
    const bool apart = kChannelsLast || pitch * static_cast<int>(sizeof(S)) % 8 == 4;
    const int turn = apart ? 0 : channel % positions;
#pragma unroll 4
    for (int i = first; i < positions; i += step) {
      const int turned = i + turn, position = turned < positions ? turned : turned - positions;
      visit(position, static_cast<A>(*at(channel, position)));
    }
  }
};

// How threads share a tile's channels: `lanes` threads of a warp a channel, one after the other channel by channel.
struct ChannelThreads {
  int first, step, lane, lanes;

  __device__ explicit ChannelThreads(int channels) : lanes(1) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    while (lanes < kLanes && 2 * lanes * channels <= threads) lanes *= 2;
    first = thread / lanes;
    step = threads / lanes;
    lane = thread % lanes;
  }

  // The total over the threads of a channel; all lanes of the warp take part.
  template <typename Total>
  __device__ __forceinline__ Total total(Total value) const {
    for (int other = lanes / 2; other > 0; other /= 2) value.add(value.from_lane(other));
    return value;
  }
};

// A maximum and where it is: the first of several, NaN the largest.
template <typename A>
struct Peak {
  A value;
  int32_t index;

  __device__ __forceinline__ void merge(A other, int32_t other_index) {
    const bool same = other == value || (other != other && value != value);
    const bool leads = same ? other_index < index : takes_the_lead(other, value);
    value = leads ? other : value;
    index = leads ? other_index : index;
  }
};

}  // namespace dan_fast
