// Squared L2 norms of the rows of a memory, n2_i = |m_i|^2, one warp a row. Of CUDA's headers only what
// grid.cuh needs.
#pragma once

#include <cstdint>

#include "../cuda/grid.cuh"

namespace dan_fast {

// features: row i starts at features + i * row_stride, its columns are adjacent; norms: (rows,).
// blockDim.x is a multiple of 32 and blockDim.x / 32 * gridDim.x >= rows.
//
// Eight independent loads a lane are in flight at a time. Lane l sums every 32nd column in eight chains and the
// warp adds its lanes in a tree, so 2045 columns are chains of eight additions: the error in Out is as small as
// that of a pairwise sum. The loads are of one element, not of 16 bytes: with an odd number of columns most
// rows start unaligned, and a warp's loads coalesce anyway.
template <typename In, typename Out>
__global__ void row_sq_norms_kernel(
    const In* __restrict__ features, int64_t row_stride, int64_t rows, int64_t columns, Out* __restrict__ norms) {
  constexpr int kChains = 8;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (row >= rows) return;  // the whole warp leaves together
  const int lane = threadIdx.x % kLanes;
  const In* x = features + row * row_stride;

  Out sums[kChains] = {};
  int64_t c = lane;
  for (; c + (kChains - 1) * kLanes < columns; c += kChains * kLanes) {
#pragma unroll
    for (int k = 0; k < kChains; ++k) {
      const Out v = static_cast<Out>(x[c + k * kLanes]);
      sums[k] += v * v;
    }
  }
#pragma unroll
  for (int k = 0; k < kChains; ++k) {
    if (c + k * kLanes < columns) {
      const Out v = static_cast<Out>(x[c + k * kLanes]);
      sums[k] += v * v;
    }
  }
#pragma unroll
  for (int half = kChains / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  const Out sum = warp_sum(sums[0]);
  if (lane == 0) norms[row] = sum;
}

}  // namespace dan_fast
