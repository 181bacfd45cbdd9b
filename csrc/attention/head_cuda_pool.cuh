// head_pool on CUDA: one read of X. A block takes some channels of a sample, a few threads each channel.
#pragma once

#include "head_cuda_plan.h"
#include "head_cuda_tile.cuh"

namespace dan_fast {

// `shared`: plan.shared_bytes. gridDim.x = batch * plan.parts.
template <typename S, typename A, bool kChannelsLast>
__device__ void head_pool_block(
    const FeatureMap<const S>& map, const Pooled<A>& out, const HeadPlan& plan, unsigned char* shared) {
  const Tile<S, kChannelsLast> tile{reinterpret_cast<S*>(shared), plan.pitch};
  TileBox box;
  box.sample = blockIdx.x / plan.parts;
  box.first_channel = blockIdx.x % plan.parts * plan.range;
  box.channels = static_cast<int>(smaller(plan.range, map.channels - box.first_channel));
  const ChannelThreads threads(box.channels);
  const bool mine = threads.first < box.channels;
  A sum = A(0);
  Peak<A> peak{-static_cast<A>(INFINITY), 0};
  for (box.first_position = 0; box.first_position < map.positions; box.first_position += plan.tile_positions) {
    box.positions = static_cast<int>(smaller(plan.tile_positions, map.positions - box.first_position));
    __syncthreads();
    tile.load(map, box);
    if (!mine) continue;
    const int32_t begin = static_cast<int32_t>(box.first_position);
    tile.template visit_positions<A>(
        threads.first, box.positions, threads.lane, threads.lanes, [&](int position, A x) {
          sum += x;
          peak.merge(x, begin + position);
        });
  }
  sum = threads.sum(sum);
  for (int other = threads.lanes / 2; other > 0; other /= 2) {
    const A value = __shfl_xor_sync(kAllLanes, peak.value, other);
    peak.merge(value, __shfl_xor_sync(kAllLanes, peak.index, other));
  }
  if (!mine || threads.lane != 0) return;
  const int64_t at = box.sample * map.channels + box.first_channel + threads.first;
  out.mean[at] = sum / static_cast<A>(map.positions);
  out.peak[at] = peak.value;
  out.peak_position[at] = peak.index;
}

}  // namespace dan_fast
