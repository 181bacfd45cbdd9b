// head_attend on CUDA: one read of X, by a cooperative grid. What both directions share stands in HeadBlock.
//
// Several blocks take a sample, each some channels, which it keeps in shared memory from the first pass (sums over
// channels) to the second (sums over positions). In between they meet once, a sample at a time: each writes its sums,
// waits for those of the others, adds all up and finds the spatial attention for itself. At 64 x 2048 x 7 x 7 in
// bfloat16 a sample is 200 KB, 5 blocks of 48 KB at most: two blocks fit a multiprocessor of 100 KB, so 82 of them work
// on 32 samples at a time, and 132 of 227 KB on all 64. Other ways: a block a sample leaves a fifth to a half of the
// multiprocessors idle and must read the map twice, because it does not fit; two launches need no barrier of the grid,
// but the map, 12.8 MB, comes back from memory wherever the L2 cache is smaller (6 MB on an RTX 3090). Only a sample of
// more than kHeadMaxParts tiles is read twice.
#pragma once

#include "head_cuda_spatial.cuh"

namespace dan_fast {

// What all threads of this block wrote before is seen by who has waited for it.
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

template <typename A>
struct ChannelSums {
  A mean;
  Peak<A> peak;
  A adversary;

  static __device__ ChannelSums none() { return {A(0), {-static_cast<A>(INFINITY), 0}, A(0)}; }
  __device__ void add(const ChannelSums& other) {
    mean += other.mean;
    peak.merge(other.peak.value, other.peak.index);
    adversary += other.adversary;
  }
};

static_assert(sizeof(ChannelSums<float>) == 4 * sizeof(float) && sizeof(ChannelSums<double>) == 4 * sizeof(double));

template <typename S, typename A, bool kChannelsLast>
class HeadBlock {
 public:
  __device__ HeadBlock(const FeatureMap<const S>& map, const HeadPlan& plan, unsigned char* shared)
      : map_(map),
        plan_(plan),
        front_(shared),
        tile_{reinterpret_cast<S*>(shared + plan.tile_offset), plan.pitch},
        part_(static_cast<int64_t>(blockIdx.x % plan.parts)),
        begin_(part_ * plan.range),
        end_(smaller(begin_ + plan.range, map.channels)),
        thread_(static_cast<int>(threadIdx.x)),
        threads_(static_cast<int>(blockDim.x)) {}

  __device__ int64_t first_sample() const { return blockIdx.x / plan_.parts; }

  // One thread for each position and share of the channels sums over them: visit(channel, x, weights, &sums).
  // fill(channel, w) is weight w of a channel of X; done(position, sums) takes the sums of the block's channels.
  template <int kWeights, typename Sums, typename Fill, typename Visit, typename Done>
  __device__ void sum_channels(int64_t sample, const Fill& fill, const Visit& visit, const Done& done) {
    A* const front = reinterpret_cast<A*>(front_);
    const int room = static_cast<int>(round_up_to_pack(plan_.tile_channels));
    const A* weights[kWeights];
#pragma unroll
    for (int w = 0; w < kWeights; ++w) weights[w] = front + w * room;
    for (int64_t p = 0; p < map_.positions; p += plan_.tile_positions) {
      const int positions = static_cast<int>(smaller(plan_.tile_positions, map_.positions - p));
      const int shares = threads_ / static_cast<int>(plan_.tile_positions);
      const int share = thread_ / positions, position = thread_ - share * positions;
      Sums sums = Sums::none();
      for (int64_t c = begin_; c < end_; c += plan_.tile_channels) {
        const int channels = static_cast<int>(smaller(plan_.tile_channels, end_ - c));
        __syncthreads();
        for (int i = thread_; i < channels; i += threads_) {
#pragma unroll
          for (int w = 0; w < kWeights; ++w) front[w * room + i] = fill(c + i, w);
        }
        tile_.load(map_, {sample, c, p, channels, positions});
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

  // visit(sums, channel, position, x) adds to the sums of a channel of X, done(channel, sums) takes them; a tile that
  // sum_channels has left is not read again.
  template <int kSums, typename Visit, typename Done>
  __device__ void sum_positions(int64_t sample, const Visit& visit, const Done& done) {
    const bool held = end_ - begin_ <= plan_.tile_channels && map_.positions <= plan_.tile_positions;
    for (int64_t c = begin_; c < end_; c += plan_.tile_channels) {
      const int channels = static_cast<int>(smaller(plan_.tile_channels, end_ - c));
      const ChannelThreads mine(channels);
      A sums[kHeadRounds][kSums] = {};
      for (int64_t p = 0; p < map_.positions; p += plan_.tile_positions) {
        const int positions = static_cast<int>(smaller(plan_.tile_positions, map_.positions - p));
        if (!held) {
          __syncthreads();
          tile_.load(map_, {sample, c, p, channels, positions});
        }
#pragma unroll
        for (int round = 0; round < kHeadRounds; ++round) {
          const int channel = mine.first + round * mine.step;
          if (channel >= channels) continue;
          tile_.template visit_positions<A>(channel, positions, mine.lane, mine.lanes, [&](int position, A x) {
            visit(sums[round], c + channel, p + position, x);
          });
        }
      }
#pragma unroll
      for (int round = 0; round < kHeadRounds; ++round) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[round][k] = mine.sum(sums[round][k]);
        const int channel = mine.first + round * mine.step;
        if (channel < channels && mine.lane == 0) done(c + channel, sums[round]);
      }
    }
  }

  // Where this block keeps the vectors of the spatial attention.
  __device__ A* scratch(const HeadWorkspace<A>& workspace) const {
    if (plan_.scratch_in_shared) return reinterpret_cast<A*>(front_ + plan_.scratch_offset);
    return workspace.scratch + static_cast<int64_t>(blockIdx.x) * plan_.scratch_size;
  }

  __device__ int64_t part() const { return part_; }
  __device__ int thread() const { return thread_; }
  __device__ int threads() const { return threads_; }

 private:
  static __device__ int64_t round_up_to_pack(int64_t channels) {
    return (channels + kPack<S> - 1) / kPack<S> * kPack<S>;
  }

  // Share 0 gets the total over the shares, which hand theirs on half by half by way of the memory of the weights.
  template <typename Sums>
  __device__ void add_up(Sums* sums, int share, int shares, int position, int positions) {
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
  const int64_t part_, begin_, end_;
  const int thread_, threads_;
};

// `shared`: plan.shared_bytes, aligned to 16 bytes. All plan.blocks() blocks run at once.
template <typename S, typename A, bool kChannelsLast>
__device__ void head_attend_block(
    const FeatureMap<const S>& map, const AttendInput<A>& in, const Attended<A>& out, const HeadPlan& plan,
    const HeadWorkspace<A>& workspace, unsigned char* shared) {
  HeadBlock<S, A, kChannelsLast> block(map, plan, shared);
  const int64_t channels = map.channels, positions = map.positions;
  const SpatialScratch<A, false> scratch{
      block.scratch(workspace), static_cast<int>(positions), static_cast<int>(in.weights.hidden)};
  const SpatialBlock<A, false> spatial(in.weights, scratch);

  for (int64_t sample = block.first_sample(); sample < map.batch; sample += plan.groups) {
    const A* const channel_attention = in.channel_attention + sample * channels;
    const A* const row = in.rows + sample * channels;
    const int64_t sums_at = sample * plan.parts * positions, own_at = sums_at + block.part() * positions;
    block.template sum_channels<2, ChannelSums<A>>(
        sample, [&](int64_t channel, int w) { return w == 0 ? channel_attention[channel] : row[channel]; },
        [](int64_t channel, A x, const A(&weights)[2], ChannelSums<A>* sums) {
          const A scaled = x * weights[0];
          sums->mean += scaled;
          if (takes_the_lead(scaled, sums->peak.value)) sums->peak = {scaled, static_cast<int32_t>(channel)};
          sums->adversary += x * weights[1];
        },
        [&](int64_t position, const ChannelSums<A>& sums) {
          workspace.mean[own_at + position] = sums.mean;
          workspace.peak[own_at + position] = sums.peak.value;
          workspace.peak_channel[own_at + position] = sums.peak.index;
          workspace.adversary[own_at + position] = sums.adversary;
        });
    arrive(workspace.arrived + sample);
    wait_for(workspace.arrived + sample, static_cast<uint32_t>(plan.parts));

    const bool writes = block.part() == 0;
    for (int64_t p = block.thread(); p < positions; p += block.threads()) {
      ChannelSums<A> sums = ChannelSums<A>::none();
      for (int64_t part = 0; part < plan.parts; ++part) {
        const int64_t at = sums_at + part * positions + p;
        sums.add({workspace.mean[at], {workspace.peak[at], workspace.peak_channel[at]}, workspace.adversary[at]});
      }
      scratch.g()[p] = sums.mean / static_cast<A>(channels);
      scratch.m()[p] = sums.peak.value;
      scratch.adversary()[p] = sums.adversary;
      if (!writes) continue;
      out.mean_map[sample * positions + p] = scratch.g()[p];
      out.peak_map[sample * positions + p] = scratch.m()[p];
      out.peak_channel[sample * positions + p] = sums.peak.index;
      out.adversary_map[sample * positions + p] = scratch.adversary()[p];
    }
    __syncthreads();
    spatial.find_gates();
    spatial.find_attention();
    if (writes) {
      for (int64_t p = block.thread(); p < positions; p += block.threads()) {
        out.spatial_attention[sample * positions + p] = scratch.spatial()[p];
      }
      if (block.thread() < kLanes) {
        const A loss = spatial.loss();
        if (block.thread() == 0) out.loss[sample] = in.labels[sample] >= 0 ? loss : A(0);
      }
    }
    block.template sum_positions<1>(
        sample,
        [&](A(&sums)[1], int64_t, int64_t position, A x) { sums[0] += x * scratch.spatial()[position]; },
        [&](int64_t channel, const A(&sums)[1]) {
          out.attended[sample * channels + channel] =
              channel_attention[channel] * (sums[0] / static_cast<A>(positions));
        });
  }
}

}  // namespace dan_fast
