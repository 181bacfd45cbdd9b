// The attention adversary of given maps on CUDA: two sums over channels in parts, a block a sample that adds them up,
// and one pass back over X.
#pragma once

#include "refine.cuh"

namespace dan_fast {

// `partial` (B, map_parts, P): sums over a block's channels of their weights (B, C), or 1 where there are none.
// kMapThreads threads; gridDim.x = batch * map_parts.
template <typename S, typename A, bool kChannelsLast>
__device__ void channel_sums_block(
    const FeatureMap<const S>& map, const A* weights, A* partial, MapShared<A>& shared) {
  A* const own_partial = partial + static_cast<int64_t>(blockIdx.x) * map.positions;
  for_boxes(map_box(blockIdx.x, map.channels), map.positions, [&](const TileBox& box) {
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (thread < box.channels) {
      const int64_t channel = box.sample * map.channels + box.first_channel + thread;
      shared.by_channel[thread] = weights == nullptr ? A(1) : weights[channel];
    }
    const int rows = kChannelsLast ? box.positions : box.channels;
    const int columns = kChannelsLast ? box.channels : box.positions;
    const BoxRows<const S, kChannelsLast> from(map, box);
    for_numbers<S>(in_packs<S>(rows, columns, from), rows, columns, [&](auto count, int row, int column) {
      constexpr int kCount = decltype(count)::value;
      S x[kCount];
      load_numbers<kCount>(from.at(row, column), x);
      for_each_of<kCount>(row, column, columns, [&](int k, int r, int c) {
        shared.terms[r * kMapPitch + c] = static_cast<A>(x[k]);
      });
    });
    __syncthreads();
    add_shares<kChannelsLast>(shared, position_share<kChannelsLast>(shared, box), box.positions, [&](int p, A sum) {
      own_partial[box.first_position + p] = sum;
    });
  });
}

// kMapThreads threads; gridDim.x = batch. `handed`: kMapThreads / kLanes numbers of shared memory.
template <typename A>
__device__ void adversary_block(
    const A* partial_refined, const A* partial_features, int64_t channels, int64_t positions,
    const AdversaryInput<A>& in, const Adversary<A>& out, A* handed) {
  const int64_t sample = blockIdx.x, parts = map_parts(channels);
  const int thread = static_cast<int>(threadIdx.x);
  const bool labelled = in.labels[sample] >= 0;
  A loss = A(0);
  for (int64_t p = thread; p < positions; p += kMapThreads) {
    const int64_t at = sample * positions + p;
    const A refined = sum_of_parts(partial_refined, parts, positions, sample, p) / static_cast<A>(channels);
    const A adversary = labelled ? sum_of_parts(partial_features, parts, positions, sample, p) : A(0);
    out.refined_map[at] = refined;
    out.adversary_map[at] = adversary;
    if (labelled) loss += adversary_term(refined, adversary);
  }
  loss = warp_sum(loss);
  if (thread % kLanes == 0) handed[thread / kLanes] = loss;
  __syncthreads();
  if (thread != 0) return;
  for (int warp = 1; warp < kMapThreads / kLanes; ++warp) loss += handed[warp];
  out.loss[sample] = loss;
}

// kMapThreads threads; gridDim.x = batch * map_parts.
template <typename S, typename A, bool kChannelsLast>
__device__ void adversary_backward_block(
    const FeatureMap<const S>& features, const AdversaryInput<A>& in, const AdversarySaved<A>& saved,
    const FeatureMap<S>& grad_features, const AdversaryInputGrad<A>& out, MapShared<A>& shared) {
  const TileBox first = map_box(blockIdx.x, features.channels);
  const int64_t row_at = first.sample * features.channels + first.first_channel;
  const bool labelled = in.labels[first.sample] >= 0;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < first.channels) shared.by_channel[thread] = in.rows[row_at + thread];
  A of_channel = A(0);
  for_boxes(first, features.positions, [&](const TileBox& box) {
    __syncthreads();
    if (thread < box.positions) {
      const int64_t at = box.sample * features.positions + box.first_position + thread;
      const AdversaryGrad<A> grad = grad_adversary_maps(saved, labelled, box.sample, at);
      shared.by_position[thread] = grad.adversary;
      if (box.first_channel == 0) out.refined_map[at] = grad.refined;
    }
    __syncthreads();
    const int rows = kChannelsLast ? box.positions : box.channels;
    const int columns = kChannelsLast ? box.channels : box.positions;
    const BoxRows<const S, kChannelsLast> from(features, box);
    const BoxRows<S, kChannelsLast> to(grad_features, box);
    for_numbers<S>(in_packs<S>(rows, columns, from, to), rows, columns, [&](auto count, int row, int column) {
      constexpr int kCount = decltype(count)::value;
      S x[kCount];
      load_numbers<kCount>(from.at(row, column), x);
      for_each_of<kCount>(row, column, columns, [&](int k, int r, int c) {
        shared.terms[r * kMapPitch + c] = static_cast<A>(x[k]);
        x[k] = static_cast<S>(shared.by_channel[kChannelsLast ? c : r] * shared.by_position[kChannelsLast ? r : c]);
      });
      store_numbers<kCount>(to.at(row, column), x);
    });
    __syncthreads();
    of_channel += channel_share<kChannelsLast>(shared, box);
  });
  __syncthreads();
  add_shares<!kChannelsLast>(shared, of_channel, first.channels, [&](int c, A sum) {
    out.rows[row_at + c] = labelled ? sum : A(0);  // whatever X holds
  });
}

}  // namespace dan_fast
