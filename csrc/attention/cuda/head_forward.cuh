// The whole attention head forward on CUDA, Eqs. (2)-(4): one launch of a cooperative grid, one read of X. It is CUDA
// C++, for Triton has neither a barrier of the grid nor shared memory that outlives one.
//
// A block pools its share of a sample and keeps it in shared memory. The products of the bottleneck are done for many
// samples at once, since each sample needs all weights: all blocks share them, for the samples that the grid works on
// at a time, between barriers of the grid. Then the blocks of a sample exchange their sums over channels: each writes
// its own, waits for the counter of the sample, adds all up and computes the spatial attention redundantly.
#pragma once

#include "head_block.cuh"
#include "head_bottleneck.cuh"
#include "head_spatial.cuh"

namespace dan_fast {

template <typename A>
struct PoolSums {
  A sum;
  Peak<A> peak;

  static __device__ PoolSums none() { return {A(0), {-static_cast<A>(INFINITY), 0}}; }
  __device__ void add(const PoolSums& other) {
    sum += other.sum;
    peak.merge(other.peak.value, other.peak.index);
  }
  __device__ PoolSums from_lane(int step) const {
    const A value = __shfl_xor_sync(kAllLanes, peak.value, step);
    return {__shfl_xor_sync(kAllLanes, sum, step), {value, __shfl_xor_sync(kAllLanes, peak.index, step)}};
  }
};

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
class HeadForward {
 public:
  __device__ HeadForward(
      const HeadInput<S, A>& in, const HeadOutput<A>& out, const HeadPlan& plan, const HeadWorkspace<A>& workspace,
      unsigned char* shared)
      : in_(in), out_(out), plan_(plan), workspace_(workspace), shared_(shared) {}

  // All blocks come here as often.
  __device__ void run() const {
    GridThreads grid(workspace_.passed);
    const int64_t batch = in_.features.batch;
    for (int64_t first = 0; first < batch; first += plan_.groups) {
      const int samples = static_cast<int>(smaller(plan_.groups, batch - first));
      const int own = static_cast<int>(Block::group(plan_));
      if (own < samples) pool(first + own);
      grid.sync();
      find_units(in_, out_, first, samples, Block::numbers(shared_), workspace_.units);
      grid.sync();
      find_channel_attention(in_, out_, first, samples, workspace_.units);
      grid.sync();
      if (own < samples) attend(first + own);
    }
  }

 private:
  using Block = HeadBlock<S, A, kChannelsLast>;

  // Made anew for each use, or it would fill the registers during the products.
  __device__ Block block() const { return Block(in_.features, plan_, shared_); }

  __device__ void pool(int64_t sample) const {
    const int64_t row = sample * in_.features.channels;
    const A positions = static_cast<A>(in_.features.positions);
    block().template sum_positions<PoolSums<A>>(
        sample, true,
        [](PoolSums<A>* sums, int64_t, int64_t position, A x) {
          sums->sum += x;
          sums->peak.merge(x, static_cast<int32_t>(position));
        },
        [&](int64_t channel, const PoolSums<A>& sums) {
          out_.pooled.mean[row + channel] = sums.sum / positions;
          out_.pooled.peak[row + channel] = sums.peak.value;
          out_.pooled.peak_position[row + channel] = sums.peak.index;
        });
  }

  __device__ void attend(int64_t sample) const {
    const int64_t positions = in_.features.positions, row = sample * in_.features.channels, map = sample * positions;
    const A* const channel_attention = out_.channel_attention + row;
    const Block block = this->block();
    const SpatialScratch<A, false> scratch{
        block.scratch(workspace_), static_cast<int>(positions), static_cast<int>(in_.spatial.hidden)};
    const SpatialBlock<A, false> spatial(in_.spatial, scratch);
    write_own_sums(block, sample, channel_attention);
    uint32_t* const arrived = workspace_.arrived + sample;
    arrive(arrived);
    wait_for(arrived, static_cast<uint32_t>(plan_.parts));
    add_up_sums(block, scratch, sample);
    __syncthreads();
    spatial.find_gates();
    spatial.find_attention();
    if (block.part() == 0) {
      for (int64_t p = block.thread(); p < positions; p += block.threads()) {
        out_.attended.spatial_attention[map + p] = scratch.spatial()[p];
      }
      if (block.thread() < kLanes) {
        const A loss = spatial.loss();
        if (block.thread() == 0) out_.attended.loss[sample] = in_.labels[sample] >= 0 ? loss : A(0);
      }
    }
    block.template sum_positions<Totals<A, 1>>(
        sample, false,
        [&](Totals<A, 1>* sums, int64_t, int64_t position, A x) {
          sums->values[0] += x * scratch.spatial()[position];
        },
        [&](int64_t channel, const Totals<A, 1>& sums) {
          out_.attended.attended[row + channel] =
              channel_attention[channel] * (sums.values[0] / static_cast<A>(positions));
        });
  }

  // The sums of this block's channels at every position.
  __device__ void write_own_sums(const Block& block, int64_t sample, const A* channel_attention) const {
    const A* const label_row = row_of_label(in_, sample);
    const int64_t own_at = (sample * plan_.parts + block.part()) * in_.features.positions;
    block.template sum_channels<2, ChannelSums<A>>(
        sample, false,
        [&](int64_t channel, int w) {
          return w == 0 ? channel_attention[channel] : label_row == nullptr ? A(0) : label_row[channel];
        },
        [](int64_t channel, A x, const A(&weights)[2], ChannelSums<A>* sums) {
          const A scaled = x * weights[0];
          sums->mean += scaled;
          if (takes_the_lead(scaled, sums->peak.value)) sums->peak = {scaled, static_cast<int32_t>(channel)};
          sums->adversary += x * weights[1];
        },
        [&](int64_t position, const ChannelSums<A>& sums) {
          workspace_.mean[own_at + position] = sums.mean;
          workspace_.peak[own_at + position] = sums.peak.value;
          workspace_.peak_channel[own_at + position] = sums.peak.index;
          workspace_.adversary[own_at + position] = sums.adversary;
        });
  }

  // Those of all blocks of the sample, into the scratch; one block writes them out, too.
  __device__ void add_up_sums(const Block& block, const SpatialScratch<A, false>& scratch, int64_t sample) const {
    const int64_t positions = in_.features.positions, map = sample * positions, sums_at = map * plan_.parts;
    for (int64_t p = block.thread(); p < positions; p += block.threads()) {
      ChannelSums<A> sums = ChannelSums<A>::none();
      for (int64_t part = 0; part < plan_.parts; ++part) {
        const int64_t at = sums_at + part * positions + p;
        sums.add({workspace_.mean[at], {workspace_.peak[at], workspace_.peak_channel[at]}, workspace_.adversary[at]});
      }
      const A mean = sums.mean / static_cast<A>(in_.features.channels);
      scratch.g()[p] = mean;
      scratch.m()[p] = sums.peak.value;
      scratch.adversary()[p] = sums.adversary;
      if (block.part() != 0) continue;
      out_.attended.mean_map[map + p] = mean;
      out_.attended.peak_map[map + p] = sums.peak.value;
      out_.attended.peak_channel[map + p] = sums.peak.index;
      out_.attended.adversary_map[map + p] = sums.adversary;
    }
  }

  const HeadInput<S, A>& in_;
  const HeadOutput<A>& out_;
  const HeadPlan& plan_;
  const HeadWorkspace<A>& workspace_;
  unsigned char* const shared_;
};

// `shared`: plan.shared_bytes, aligned to 16 bytes. All plan.blocks() blocks run at once.
template <typename S, typename A, bool kChannelsLast>
__device__ void head_forward_block(
    const HeadInput<S, A>& in, const HeadOutput<A>& out, const HeadPlan& plan, const HeadWorkspace<A>& workspace,
    unsigned char* shared) {
  HeadForward<S, A, kChannelsLast>(in, out, plan, workspace, shared).run();
}

}  // namespace dan_fast
