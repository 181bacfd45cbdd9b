// head_features_backward on CUDA: one write of dX; X is not read. A block writes some channels at some positions.
#pragma once

#include "head_plan.h"
#include "head_tile.cuh"

namespace dan_fast {

constexpr int kGradChannels = 256, kGradPositions = 256;
static_assert(kGradChannels / kPack<double> <= kHeadThreads, "a thread for each pack of channels");

template <typename S, typename A>
struct FeaturesGradShared {
  // Neighbouring lanes are a pack apart in what they read: with a gap after each, they use different banks.
  static __device__ int at(int i) { return i + i / kPack<S>; }
  static constexpr int kChannels = kGradChannels + kGradChannels / kPack<S>;
  static constexpr int kPositions = kGradPositions + kGradPositions / kPack<S>;

  Pack<A, 4> channels[kChannels];    // d_attended A_C / P, A_C, row, d_mean / P
  Pack<A, 4> positions[kPositions];  // A_S, d_g / C, d_A_ad, d_m
  A grad_peak[kChannels];
  int32_t peak_position[kChannels];  // counted from the block's first, as is the next
  int32_t peak_channel[kPositions];
};

template <typename A>
__device__ __forceinline__ A grad_feature_at(
    const Pack<A, 4>& channel, const Pack<A, 4>& position, A grad_peak, bool is_peak, bool leads) {
  A grad = grad_feature(
      channel.values[0], channel.values[1], channel.values[2], channel.values[3], position.values[0],
      position.values[1], position.values[2]);
  if (leads) grad += position.values[3] * channel.values[1];
  if (is_peak) grad += grad_peak;
  return grad;
}

// `count` numbers; all kCount of them, to an aligned address, at once.
template <typename S, int kCount>
__device__ __forceinline__ void store_pack(S* to, const Pack<S, kCount>& values, int count, bool aligned) {
  if (aligned && count >= kCount) {
    *reinterpret_cast<Pack<S, kCount>*>(to) = values;
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (k < count) to[k] = values.values[k];
  }
}

// kHeadThreads threads; gridDim.x = batch * blocks of kGradChannels * blocks of kGradPositions, those of one sample and
// its channels next to each other.
template <typename S, typename A, bool kChannelsLast>
__device__ void head_features_backward_block(
    const FeatureMap<S>& map, const FeaturesGradInput<A>& in, FeaturesGradShared<S, A>& shared) {
  constexpr int kCount = kPack<S>;
  const int64_t position_blocks = (map.positions + kGradPositions - 1) / kGradPositions;
  const int64_t channel_blocks = (map.channels + kGradChannels - 1) / kGradChannels;
  const int64_t sample = blockIdx.x / (position_blocks * channel_blocks);
  const int64_t c0 = blockIdx.x / position_blocks % channel_blocks * kGradChannels;
  const int64_t p0 = blockIdx.x % position_blocks * kGradPositions;
  const int channels = static_cast<int>(smaller<int64_t>(kGradChannels, map.channels - c0));
  const int positions = static_cast<int>(smaller<int64_t>(kGradPositions, map.positions - p0));
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const A per_position = A(1) / static_cast<A>(map.positions), per_channel = A(1) / static_cast<A>(map.channels);

  for (int i = thread; i < channels; i += threads) {
    const int64_t at = sample * map.channels + c0 + i;
    const int to = shared.at(i);
    const A attention = in.channel_attention[at];
    shared.channels[to] = {
        {in.grad_attended[at] * attention * per_position, attention, in.rows[at], in.grad_mean[at] * per_position}};
    shared.grad_peak[to] = in.grad_peak[at];
    shared.peak_position[to] = static_cast<int32_t>(in.peak_position[at] - p0);
  }
  for (int i = thread; i < positions; i += threads) {
    const int64_t at = sample * map.positions + p0 + i;
    const int to = shared.at(i);
    shared.positions[to] = {
        {in.spatial_attention[at], in.grad_mean_map[at] * per_channel, in.grad_adversary_map[at],
         in.grad_peak_map[at]}};
    shared.peak_channel[to] = static_cast<int32_t>(in.peak_channel[at] - c0);
  }
  __syncthreads();

  S* const to =
      map.data + sample * map.sample_stride + c0 * map.channel_stride + p0 * map.position_stride;
  const int64_t stride = kChannelsLast ? map.position_stride : map.channel_stride;
  const bool begins_aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0, rows_aligned = stride % kCount == 0;
  if constexpr (kChannelsLast) {
    // A thread keeps a pack of channels and walks over positions.
    const int packs = (channels + kCount - 1) / kCount, step = threads / packs;
    const int first = thread / packs, c = (thread - first * packs) * kCount;
    if (first >= step) return;
    const int count = smaller(kCount, channels - c);
    Pack<A, 4> own[kCount];
    A grad_peak[kCount];
    int32_t peak_position[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int channel = shared.at(smaller(c + k, channels - 1));
      own[k] = shared.channels[channel];
      grad_peak[k] = shared.grad_peak[channel];
      peak_position[k] = shared.peak_position[channel];
    }
    for (int p = first; p < positions; p += step) {
      const Pack<A, 4> position = shared.positions[shared.at(p)];
      const int32_t leader = shared.peak_channel[shared.at(p)];
      Pack<S, kCount> grads;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        grads.values[k] = static_cast<S>(
            grad_feature_at(own[k], position, grad_peak[k], peak_position[k] == p, leader == c + k));
      }
      store_pack(to + p * stride + c, grads, count, begins_aligned && rows_aligned);
    }
  } else {
    // Whole rows are one run, which packs may cross the ends of rows in.
    const bool one_run = positions == stride;
    const int rows = one_run ? 1 : channels, columns = one_run ? channels * positions : positions;
    const int packs = (columns + kCount - 1) / kCount;
    for (int i = thread; i < rows * packs; i += threads) {
      const int row = i / packs, column = (i - row * packs) * kCount, count = smaller(kCount, columns - column);
      int c = one_run ? column / positions : row, p = one_run ? column - c * positions : column;
      Pack<S, kCount> grads;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (k < count) {
          const int at_c = shared.at(c), at_p = shared.at(p);
          grads.values[k] = static_cast<S>(grad_feature_at(
              shared.channels[at_c], shared.positions[at_p], shared.grad_peak[at_c], shared.peak_position[at_c] == p,
              shared.peak_channel[at_p] == c));
        }
        if (++p == positions) {
          p = 0;
          ++c;
        }
      }
      store_pack(to + row * stride + column, grads, count, begins_aligned && (one_run || rows_aligned));
    }
  }
}

}  // namespace dan_fast
