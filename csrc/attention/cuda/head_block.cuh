// One block's share of a sample, some of its channels, and the passes over it that the kernels of the attention head
// are made of: sums over the channels of a position, and over the positions of a channel.
//
// A share lies in shared memory from the first pass to the last. At 64 x 2048 x 7 x 7 in bfloat16 a sample is 200 KB, 5
// blocks of 48 KB at most: two blocks fit a multiprocessor of 100 KB, so 82 of them work on 32 samples at a time, and
// 132 of 227 KB on all 64. Blocks that need each other's sums wait at a counter: all run at once. Other ways: a block a
// sample leaves a fifth to a half of the multiprocessors idle and must read the map again, because it does not fit;
// separate launches need no barrier, but the map, 12.8 MB, is read from memory again wherever the L2 cache is smaller
// (6 MB on an RTX 3090). Only a sample of more than kHeadMaxParts tiles is read again.
#pragma once

#include "head_plan.h"
#include "head_tile.cuh"

namespace dan_fast {

// What all threads of this block wrote before is visible to a block that has returned from `wait_for`.
__device__ __forceinline__ void arrive(uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x == 0) add_release(counter, 1);
}

__device__ __forceinline__ void wait_for(const uint32_t* counter, uint32_t count) {
  if (threadIdx.x == 0) {
    while (load_acquire(counter) != count) {
    }
  }
  __syncthreads();
}

// Plain sums.
template <typename A, int kCount>
struct Totals {
  A values[kCount];

  static __device__ Totals none() { return {}; }
  __device__ void add(const Totals& other) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] += other.values[k];
  }
  __device__ Totals from_lane(int step) const {
    Totals other;
#pragma unroll
    for (int k = 0; k < kCount; ++k) other.values[k] = __shfl_xor_sync(kAllLanes, values[k], step);
    return other;
  }
};

template <typename S, typename A, bool kChannelsLast>
class HeadBlock {
 public:
  __device__ HeadBlock(const FeatureMap<const S>& map, const HeadPlan& plan, unsigned char* shared)
      : map_(map),
        plan_(plan),
        front_(shared),
        tile_{reinterpret_cast<S*>(shared + plan.tile_offset), plan.pitch},
        part_(static_cast<int>(blockIdx.x % plan.parts)),
        begin_(static_cast<int>(part_ * plan.range)),
        end_(static_cast<int>(smaller(begin_ + plan.range, map.channels))),
        thread_(static_cast<int>(threadIdx.x)),
        threads_(static_cast<int>(blockDim.x)) {}

  // Of the plan.groups that work on a sample each.
  static __device__ int64_t group(const HeadPlan& plan) { return blockIdx.x / plan.parts; }

  // One thread for each position and share of the channels sums over them: visit(channel, x, weights, &sums).
  // fill(channel, w) is weight w of a channel of X; done(position, sums) takes the sums of the block's channels.
  // `fresh`: this is the first pass over the sample.
  template <int kWeights, typename Sums, typename Fill, typename Visit, typename Done>
  __device__ void sum_channels(
      int64_t sample, bool fresh, const Fill& fill, const Visit& visit, const Done& done) const {
    A* const front = numbers(front_);
    const bool reads = fresh || !held();
    const int room = static_cast<int>(round_up_to_pack(plan_.tile_channels));
    const A* weights[kWeights];
#pragma unroll
    for (int w = 0; w < kWeights; ++w) weights[w] = front + w * room;
    for (int p = 0; p < map_.positions; p += static_cast<int>(plan_.tile_positions)) {
      const int positions = static_cast<int>(smaller(plan_.tile_positions, map_.positions - p));
      const int shares = threads_ / static_cast<int>(plan_.tile_positions);
      const int share = thread_ / positions, position = thread_ - share * positions;
      Sums sums = Sums::none();
      for (int c = begin_; c < end_; c += static_cast<int>(plan_.tile_channels)) {
        const int channels = static_cast<int>(smaller<int64_t>(plan_.tile_channels, end_ - c));
        __syncthreads();
        for (int i = thread_; i < channels; i += threads_) {
#pragma unroll
          for (int w = 0; w < kWeights; ++w) front[w * room + i] = fill(c + i, w);
        }
        reads ? tile_.load(map_, {sample, c, p, channels, positions}) : __syncthreads();
        if (share < shares) {
          tile_.template visit_channels<A, kWeights>(
              channels, position, share, shares, weights, [&](int channel, A x, const A(&own)[kWeights]) {
                visit(c + channel, x, own, &sums);
              });
        }
      }
      add_up(&sums, share, shares, position, positions);
      if (share == 0) done(p + position, sums);
    }
  }

  // visit(sums, channel, position, x) adds to the sums of a channel of X, done(channel, sums) takes them. `fresh` as in
  // sum_channels.
  template <typename Sums, typename Visit, typename Done>
  __device__ void sum_positions(int64_t sample, bool fresh, const Visit& visit, const Done& done) const {
    const bool reads = fresh || !held();
    for (int c = begin_; c < end_; c += static_cast<int>(plan_.tile_channels)) {
      const int channels = static_cast<int>(smaller<int64_t>(plan_.tile_channels, end_ - c));
      const ChannelThreads mine(channels);
      Sums sums[kHeadRounds];
#pragma unroll
      for (int round = 0; round < kHeadRounds; ++round) sums[round] = Sums::none();
      for (int p = 0; p < map_.positions; p += static_cast<int>(plan_.tile_positions)) {
        const int positions = static_cast<int>(smaller(plan_.tile_positions, map_.positions - p));
        if (reads) {
          __syncthreads();
          tile_.load(map_, {sample, c, p, channels, positions});
        }
#pragma unroll
        for (int round = 0; round < kHeadRounds; ++round) {
          const int channel = mine.first + round * mine.step;
          if (channel >= channels) continue;
          tile_.template visit_positions<A>(channel, positions, mine.lane, mine.lanes, [&](int position, A x) {
            visit(&sums[round], c + channel, p + position, x);
          });
        }
      }
#pragma unroll
      for (int round = 0; round < kHeadRounds; ++round) {
        const Sums total = mine.total(sums[round]);
        const int channel = mine.first + round * mine.step;
        if (channel < channels && mine.lane == 0) done(c + channel, total);
      }
    }
  }

  // Where this block keeps the vectors of the spatial attention.
  __device__ A* scratch(const HeadWorkspace<A>& workspace) const {
    if (plan_.scratch_in_shared) return reinterpret_cast<A*>(front_ + plan_.scratch_offset);
    return workspace.scratch + static_cast<int64_t>(blockIdx.x) * plan_.scratch_size;
  }

  // Where a pass keeps the weights of its channels; free between passes.
  static __device__ A* numbers(unsigned char* shared) { return reinterpret_cast<A*>(shared); }

  __device__ int part() const { return part_; }
  __device__ int thread() const { return thread_; }
  __device__ int threads() const { return threads_; }

 private:
  // Whether one tile is all of the block's share, so that it stays.
  __device__ bool held() const {
    return end_ - begin_ <= plan_.tile_channels && map_.positions <= plan_.tile_positions;
  }

  static __device__ int64_t round_up_to_pack(int64_t channels) {
    return (channels + kPack<S> - 1) / kPack<S> * kPack<S>;
  }

  // Share 0 gets the total over the shares, which hand theirs on half by half by way of the memory of the weights.
  template <typename Sums>
  __device__ void add_up(Sums* sums, int share, int shares, int position, int positions) const {
    Sums* const handed = reinterpret_cast<Sums*>(front_);
    for (int count = shares; count > 1;) {
      const int kept = (count + 1) / 2;
      __syncthreads();
      if (share >= kept && share < count) handed[(share - kept) * positions + position] = *sums;
      __syncthreads();
      if (share < count - kept) sums->add(handed[share * positions + position]);
      count = kept;
    }
  }

  const FeatureMap<const S>& map_;
  const HeadPlan& plan_;
  unsigned char* const front_;
  const Tile<S, kChannelsLast> tile_;
  const int part_, begin_, end_, thread_, threads_;
};

}  // namespace dan_fast
