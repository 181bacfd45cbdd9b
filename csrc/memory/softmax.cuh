// softmax.h on CUDA: a block a row, then a warp of slots a block. Of CUDA's headers only what grid.cuh needs.
#pragma once

#include <cstdint>

#include "../cuda/grid.cuh"
#include "softmax.h"

namespace dan_fast {

template <typename T>
struct Sum {
  T value;
  static __device__ Sum none() { return {T(0)}; }
  __device__ void add(const Sum& other) { value += other.value; }
  __device__ Sum from_lane(int step) const { return {__shfl_xor_sync(kAllLanes, value, step)}; }
};

template <typename T>
struct SoftmaxShared {
  Sum<T> sums[kMaxWarps + 1];
};

// Row blockIdx.x of weights; occupied (s,) 0 or 1, or null: every slot is.
template <typename T>
__device__ __forceinline__ void slot_softmax_row(
    const SlotScores<T>& in, const uint8_t* __restrict__ occupied, T* __restrict__ weights, SoftmaxShared<T>& shared) {
  const int64_t row = blockIdx.x;
  const T length = finite_key_length(in.key_squares[row]);
  const T* const scores = in.scores + row * in.slots;
  T* const result = weights + row * in.slots;
  T sum = T(0);
  for (int64_t i = threadIdx.x; i < in.slots; i += blockDim.x) {
    const bool counts = occupied == nullptr || occupied[i] != 0;
    const T exponential = counts ? attention(scores[i], in.square_norms[i], length) : T(0);
    result[i] = exponential;
    sum += exponential;
  }
  const T total = GridThreads(nullptr).block_total(Sum<T>{sum}, shared.sums).value;
  // Every thread reads again what it wrote itself.
  for (int64_t i = threadIdx.x; i < in.slots; i += blockDim.x) result[i] = normalised(result[i], total);
}

// Row blockIdx.x of the gradient of scores, its number of that of key_squares, and means[row] = sum_i w_i g_i.
template <typename T>
__device__ __forceinline__ void slot_softmax_backward_row(
    const SlotScores<T>& in, const SoftmaxGradient<T>& gradient, T* __restrict__ means, SoftmaxShared<T>& shared) {
  const int64_t row = blockIdx.x;
  const T* const scores = in.scores + row * in.slots;
  const T* const weights = gradient.weights + row * in.slots;
  const T* const grad = gradient.grad + row * in.slots;
  GridThreads threads(nullptr);
  T sum = T(0);
  for (int64_t i = threadIdx.x; i < in.slots; i += blockDim.x) sum += weighted_gradient(weights[i], grad[i]);
  const T mean = threads.block_total(Sum<T>{sum}, shared.sums).value;
  const T key_square = in.key_squares[row];
  sum = T(0);
  for (int64_t i = threadIdx.x; i < in.slots; i += blockDim.x) {
    const auto grad_slot = attention_backward(weights[i], grad[i], mean, scores[i], in.square_norms[i], key_square);
    gradient.scores[row * in.slots + i] = grad_slot.score;
    sum += grad_slot.key_square;
  }
  const T grad_key_square = threads.block_total(Sum<T>{sum}, shared.sums).value;
  if (threadIdx.x == 0) {
    means[row] = mean;
    gradient.key_squares[row] = grad_key_square;
  }
}

template <typename T>
struct ColumnShared {
  T sums[kMaxWarps][kLanes];
};

// The gradient of square_norms of slots blockIdx.x * 32 + lane: a warp adds up every blockDim.x / 32-th row, then one
// warp the warps, always in the same order.
template <typename T>
__device__ __forceinline__ void slot_softmax_backward_slots(
    const SlotScores<T>& in, const SoftmaxGradient<T>& gradient, const T* __restrict__ means,
    ColumnShared<T>& shared) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  T sum = T(0);
  if (slot < in.slots) {
    const T square_norm = in.square_norms[slot];
    for (int64_t row = warp; row < in.rows; row += warps) {
      const int64_t at = row * in.slots + slot;
      sum += attention_backward(
                 gradient.weights[at], gradient.grad[at], means[row], in.scores[at], square_norm, in.key_squares[row])
                 .square_norm;
    }
  }
  shared.sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || slot >= in.slots) return;
  for (int other = 1; other < warps; ++other) sum += shared.sums[other][lane];
  gradient.square_norms[slot] = sum;
}

}  // namespace dan_fast
