// The products of the bottleneck of channel attention on CUDA, A_C = sigmoid(wc2 (relu(wc1 mean) + relu(wc1 peak))):
// tens of samples, hundreds of units, thousands of channels. Every sum has an order of its own, whatever the number of
// samples or blocks: the same bits in every run and in every batch.
//
// Both factors lie along the sum, which the lanes of a warp share; products of a few rows of one with a few of the
// other are held in registers.
#pragma once

#include "../../cuda/grid.cuh"
#include "head_plan.h"
#include "head_tile.cuh"

namespace dan_fast {

// The classifier's row of a sample's label, null for -1. A label that is no class takes some row: its loss is not used.
template <typename S, typename A>
__device__ const A* row_of_label(const HeadInput<S, A>& in, int64_t sample) {
  const int64_t label = in.labels[sample];
  return label < 0 ? nullptr : in.cam_weight + smaller(label, in.classes - 1) * in.features.channels;
}

// What a warp finds at once is a tile of kDotSize by kDotSize numbers.
constexpr int kDotSize = 4, kDots = kDotSize * kDotSize;

// Lane l of the warp gets the sum over k of left[l / kDotSize % kDotSize, k] right[l % kDotSize, k], k = first,
// first + step, ..., the lanes one after the other; both matrices of rows as long as the sum. Rows from `rows` and
// `columns` on repeat the last.
template <typename A>
__device__ __forceinline__ A dot_tile(
    const A* left, int rows, const A* right, int columns, int64_t depth, int first, int step) {
  A sums[kDots] = {};
  // As many at once as the registers have room for.
#pragma unroll 3
  for (int64_t k = first; k < depth; k += step) {
    // From row to row, which takes fewer registers than a place for each.
    const A* from = left + k;
    A own[kDotSize];
#pragma unroll
    for (int r = 0; r < kDotSize; ++r) {
      own[r] = *from;
      if (r + 1 < rows) from += depth;
    }
    from = right + k;
#pragma unroll
    for (int c = 0; c < kDotSize; ++c) {
      const A other = *from;
      if (c + 1 < columns) from += depth;
#pragma unroll
      for (int r = 0; r < kDotSize; ++r) sums[r * kDotSize + c] += own[r] * other;
    }
  }
  return warp_sum_of_each(sums);
}

// A tile of a product of samples by columns, `kColumns` wide. Their number fits an int as any array fits memory.
template <int kColumns>
struct DotTile {
  int sample, column;  // its first
  int rows, columns;

  static __device__ unsigned count(int samples, int64_t columns) {
    return static_cast<unsigned>((samples + kDotSize - 1) / kDotSize * ((columns + kColumns - 1) / kColumns));
  }

  __device__ DotTile(unsigned tile, int all_samples, int64_t all_columns) {
    const unsigned by_sample = static_cast<unsigned>((all_samples + kDotSize - 1) / kDotSize);
    sample = static_cast<int>(tile % by_sample) * kDotSize;
    column = static_cast<int>(tile / by_sample) * kColumns;
    rows = smaller(kDotSize, all_samples - sample);
    columns = static_cast<int>(smaller<int64_t>(kColumns, all_columns - column));
  }
};

// of_mean = wc1 mean, of_peak = wc1 peak and, into `found`, the units from them, relu(of_mean) + relu(of_peak), for
// some samples from `first` on, by all blocks. `shared`: kHeadProductNumbers.
template <typename S, typename A>
__device__ void find_units(
    const HeadInput<S, A>& in, const HeadOutput<A>& out, int64_t first, int samples, A* shared, A* found) {
  // A warp a task: two kinds, two halves of the columns, two of the sum.
  constexpr int kTasks = 8, kColumns = 2 * kDotSize;
  static_assert(kTasks * kDots == kHeadProductNumbers);
  using Tile = DotTile<kColumns>;
  const int64_t channels = in.features.channels, units = in.units;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes;
  const unsigned tiles = Tile::count(samples, units);
  for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Tile at(tile, samples, units);
    for (int task = warp; task < kTasks; task += static_cast<int>(blockDim.x) / kLanes) {
      const A* const pooled = (task < kTasks / 2 ? out.pooled.mean : out.pooled.peak) + (first + at.sample) * channels;
      const int skipped = smaller(task / 2 % 2 * kDotSize, at.columns - 1);
      const A sum = dot_tile(
          pooled, at.rows, in.wc1 + (at.column + skipped) * channels, at.columns - skipped, channels,
          task % 2 * kLanes + lane, 2 * kLanes);
      if (lane < kDots) shared[task * kDots + lane] = sum;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kDotSize * kColumns; i += static_cast<int>(blockDim.x)) {
      const int row = i / kColumns, column = i % kColumns;
      if (row >= at.rows || column >= at.columns) continue;
      const A* const mean = shared + column / kDotSize * 2 * kDots + row * kDotSize + column % kDotSize;
      const A* const peak = mean + kTasks / 2 * kDots;
      const A of_mean = mean[0] + mean[kDots], of_peak = peak[0] + peak[kDots];
      const int64_t to = (first + at.sample + row) * units + at.column + column;
      out.of_mean[to] = of_mean;
      out.of_peak[to] = of_peak;
      found[to] = relu(of_mean) + relu(of_peak);
    }
    __syncthreads();
  }
}

// A_C from the units for some samples from `first` on, by all blocks.
template <typename S, typename A>
__device__ void find_channel_attention(
    const HeadInput<S, A>& in, const HeadOutput<A>& out, int64_t first, int samples, const A* found) {
  using Tile = DotTile<kDotSize>;
  const int64_t channels = in.features.channels, units = in.units;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const unsigned warps = blockDim.x / kLanes, tiles = Tile::count(samples, channels);
  for (unsigned tile = blockIdx.x * warps + threadIdx.x / kLanes; tile < tiles; tile += gridDim.x * warps) {
    const Tile at(tile, samples, channels);
    const A* const weights = in.wc2 + static_cast<int64_t>(at.column) * units;
    const A sum =
        dot_tile(found + (first + at.sample) * units, at.rows, weights, at.columns, units, lane, kLanes);
    const int row = lane / kDotSize, column = lane % kDotSize;
    if (row < at.rows && column < at.columns) {
      out.channel_attention[(first + at.sample + row) * channels + at.column + column] = sigmoid(sum);
    }
  }
}

}  // namespace dan_fast
