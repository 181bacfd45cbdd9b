// X'' = X A_C A_S and its derivative on CUDA. Sums over all channels of a sample are left in parts, which a second
// kernel adds up in their order: no atomics, the same bits in every run.
#pragma once

#include "refine_block.cuh"

namespace dan_fast {

// The attentions of a box, once all threads have read those of the last.
template <typename A>
__device__ __forceinline__ void load_attentions(
    const Attentions<A>& in, int64_t channels, int64_t positions, const TileBox& box, MapWeights<A>& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (thread < box.channels) shared.by_channel[thread] = in.channel[box.sample * channels + box.first_channel + thread];
  if (thread < box.positions) {
    shared.by_position[thread] = in.spatial[box.sample * positions + box.first_position + thread];
  }
  __syncthreads();
}

// An element of a box's row and column, the attentions in the order of the equation.
template <bool kChannelsLast, typename A>
__device__ __forceinline__ A refine_at(const MapWeights<A>& shared, A x, int row, int column) {
  return refine(x, shared.by_channel[kChannelsLast ? column : row], shared.by_position[kChannelsLast ? row : column]);
}

// kMapThreads threads; gridDim.x = batch * map_parts, as for the next.
template <typename S, typename A, bool kChannelsLast>
__device__ void refine_block(
    const FeatureMap<const S>& features, const Attentions<A>& in, const FeatureMap<S>& refined, MapWeights<A>& shared) {
  for_boxes(map_box(blockIdx.x, features.channels), features.positions, [&](const TileBox& box) {
    load_attentions(in, features.channels, features.positions, box, shared);
    const int rows = kChannelsLast ? box.positions : box.channels;
    const int columns = kChannelsLast ? box.channels : box.positions;
    const BoxRows<const S, kChannelsLast> from(features, box);
    const BoxRows<S, kChannelsLast> to(refined, box);
    for_numbers<S>(in_packs<S>(rows, columns, from, to), rows, columns, [&](auto count, int row, int column) {
      constexpr int kCount = decltype(count)::value;
      S x[kCount], y[kCount];
      load_numbers<kCount>(from.at(row, column), x);
      for_each_of<kCount>(row, column, columns, [&](int k, int r, int c) {
        y[k] = static_cast<S>(refine_at<kChannelsLast>(shared, static_cast<A>(x[k]), r, c));
      });
      store_numbers<kCount>(to.at(row, column), y);
    });
  });
}

// `partial` (B, map_parts, P) takes what each block has of the gradient of A_S.
template <typename S, typename A, bool kChannelsLast>
__device__ void refine_backward_block(
    const FeatureMap<const S>& features, const Attentions<A>& in, const FeatureMap<const S>& grad_refined,
    const FeatureMap<S>& grad_features, A* grad_channel_attention, A* partial, MapShared<A>& shared) {
  const TileBox first = map_box(blockIdx.x, features.channels);
  A* const own_partial = partial + static_cast<int64_t>(blockIdx.x) * features.positions;
  A of_channel = A(0);
  for_boxes(first, features.positions, [&](const TileBox& box) {
    load_attentions(in, features.channels, features.positions, box, shared);
    const int rows = kChannelsLast ? box.positions : box.channels;
    const int columns = kChannelsLast ? box.channels : box.positions;
    const BoxRows<const S, kChannelsLast> from(features, box), upstream(grad_refined, box);
    const BoxRows<S, kChannelsLast> to(grad_features, box);
    for_numbers<S>(in_packs<S>(rows, columns, from, upstream, to), rows, columns, [&](auto count, int row, int column) {
      constexpr int kCount = decltype(count)::value;
      S x[kCount], grad[kCount];
      load_numbers<kCount>(from.at(row, column), x);
      load_numbers<kCount>(upstream.at(row, column), grad);
      for_each_of<kCount>(row, column, columns, [&](int k, int r, int c) {
        const A wide = static_cast<A>(grad[k]);
        shared.terms[r * kMapPitch + c] = static_cast<A>(x[k]) * wide;
        grad[k] = static_cast<S>(refine_at<kChannelsLast>(shared, wide, r, c));
      });
      store_numbers<kCount>(to.at(row, column), grad);
    });
    __syncthreads();
    of_channel += channel_share<kChannelsLast>(shared, box);
    add_shares<kChannelsLast>(shared, position_share<kChannelsLast>(shared, box), box.positions, [&](int p, A sum) {
      own_partial[box.first_position + p] = sum;
    });
  });
  __syncthreads();
  add_shares<!kChannelsLast>(shared, of_channel, first.channels, [&](int c, A sum) {
    grad_channel_attention[first.sample * features.channels + first.first_channel + c] = sum;
  });
}

// The sum over the parts of a position of a sample.
template <typename A>
__device__ __forceinline__ A sum_of_parts(
    const A* partial, int64_t parts, int64_t positions, int64_t sample, int64_t p) {
  A sum = A(0);
  for (int64_t part = 0; part < parts; ++part) sum += partial[(sample * parts + part) * positions + p];
  return sum;
}

// A thread for each of the `size` = batch * positions sums.
template <typename A>
__device__ void add_parts(const A* partial, int64_t parts, int64_t positions, int64_t size, A* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) sums[i] = sum_of_parts(partial, parts, positions, i / positions, i % positions);
}

}  // namespace dan_fast
