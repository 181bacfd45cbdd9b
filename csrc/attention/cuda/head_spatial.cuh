// The spatial attention of one sample, Eq. (3), and its derivative, by the threads of one block. Every block of a
// sample computes it, which is cheaper than another exchange between blocks. ../rules.h holds the formulas.
#pragma once

#include "head_plan.h"
#include "head_tile.cuh"

namespace dan_fast {

// What the pass over X that ends the derivative needs of a position: A_S and gradients of g / C, A_ad and m.
template <typename A>
using PositionGrad = Pack<A, 4>;

// Vectors over positions, P numbers each, and hidden units of A, B, C, h each: in shared memory, or in global memory of
// the block's own. Addresses are worked out where they are needed, or they would fill the registers.
template <typename A, bool kBackward>
struct SpatialScratch {
  A* begin;
  int positions, hidden_units;

  __device__ A* g() const { return begin; }
  __device__ A* m() const { return begin + positions; }
  __device__ A* adversary() const { return begin + 2 * positions; }
  __device__ A* a() const { return begin + 3 * positions; }  // then those of B and C
  __device__ A* b() const { return begin + 4 * positions; }
  __device__ A* c() const { return begin + 5 * positions; }
  __device__ A* spatial() const { return begin + 6 * positions; }
  // Backward only, as are the next; of a, b, c before their sigmoids.
  __device__ A* grad_spatial() const { return begin + 7 * positions; }
  __device__ A* total() const { return begin + 8 * positions; }
  __device__ A* grad_a() const { return begin + 9 * positions; }  // then those of b and c
  __device__ A* grad_b() const { return begin + 10 * positions; }
  __device__ A* grad_c() const { return begin + 11 * positions; }
  __device__ PositionGrad<A>* grad_positions() const {
    return reinterpret_cast<PositionGrad<A>*>(begin + 12 * positions);
  }
  __device__ A* hidden() const { return begin + (kBackward ? 16 : 7) * positions; }  // (3, h)
  __device__ A* grad_hidden() const { return hidden() + 3 * hidden_units; }          // (3, h) backward only
};

template <typename A, bool kBackward>
class SpatialBlock {
 public:
  __device__ SpatialBlock(const SpatialWeights<A>& weights, const SpatialScratch<A, kBackward>& scratch)
      : weights_(weights),
        scratch_(scratch),
        positions_(scratch.positions),
        hidden_(scratch.hidden_units),
        thread_(static_cast<int>(threadIdx.x)),
        threads_(static_cast<int>(blockDim.x)),
        lane_(thread_ % kLanes),
        warp_(thread_ / kLanes),
        warps_(threads_ / kLanes) {}

  // A, B, C from g and m, which every thread must have been seen to write.
  __device__ void find_gates() const {
    for (int unit = warp_; unit < 3 * hidden_; unit += warps_) {
      const int kind = unit / hidden_, row = unit - kind * hidden_;
      const A* const weight = (kind == 2 ? weights_.ws3 : weights_.ws1) + static_cast<int64_t>(row) * positions_;
      const A* const vector = kind == 1 ? scratch_.m() : scratch_.g();
      A sum = A(0);
      for (int p = lane_; p < positions_; p += kLanes) sum += weight[p] * vector[p];
      sum = warp_sum(sum);
      if (lane_ == 0) scratch_.hidden()[unit] = relu(sum);
    }
    __syncthreads();
    for (int i = thread_; i < 3 * positions_; i += threads_) {
      const int kind = i / positions_, p = i - kind * positions_;
      const A* const weight = (kind == 2 ? weights_.ws4 : weights_.ws2) + static_cast<int64_t>(p) * hidden_;
      const A* const units = scratch_.hidden() + kind * hidden_;
      A sum = A(0);
      for (int j = 0; j < hidden_; ++j) sum += weight[j] * units[j];
      scratch_.a()[i] = sigmoid(sum);  // a, b and c lie together
    }
    __syncthreads();
  }

  // A_S from A, B, C.
  __device__ void find_attention() const {
    for (int p = warp_; p < positions_; p += warps_) {
      const A a = scratch_.a()[p];
      A total = A(0), sum = A(0);
      for (int q = lane_; q < positions_; q += kLanes) {
        const A weight = affinity(a, scratch_.b()[q]);
        total += weight;
        sum += weight * scratch_.c()[q];
      }
      total = warp_sum(total);
      sum = warp_sum(sum);
      if (lane_ == 0) scratch_.spatial()[p] = sum / total;
    }
    __syncthreads();
  }

  // L_aad from g, A_S and A_ad, for all lanes of the warp that asks.
  __device__ A loss() const {
    A sum = A(0);
    for (int p = lane_; p < positions_; p += kLanes) {
      sum += adversary_term(scratch_.g()[p] * scratch_.spatial()[p], scratch_.adversary()[p]);
    }
    return warp_sum(sum);
  }

  // The gradients of a, b, c and of the hidden units from grad_spatial, after find_gates.
  __device__ void find_gradients() const {
    for (int p = warp_; p < positions_; p += warps_) {
      const A a = scratch_.a()[p], spatial = scratch_.spatial()[p], grad = scratch_.grad_spatial()[p];
      A total = A(0), sum = A(0);
      for (int q = lane_; q < positions_; q += kLanes) {
        const A weight = affinity(a, scratch_.b()[q]);
        total += weight;
        sum += affinity_backward(weight, scratch_.c()[q], spatial, grad) * scratch_.b()[q];
      }
      total = warp_sum(total);
      sum = warp_sum(sum) / total;
      if (lane_ == 0) {
        scratch_.total()[p] = total;
        scratch_.grad_a()[p] = sum * sigmoid_backward(a);
      }
    }
    __syncthreads();
    for (int q = warp_; q < positions_; q += warps_) {
      const A b = scratch_.b()[q], c = scratch_.c()[q];
      A grad_b = A(0), grad_c = A(0);
      for (int p = lane_; p < positions_; p += kLanes) {
        const A weight = affinity(scratch_.a()[p], b) / scratch_.total()[p], grad = scratch_.grad_spatial()[p];
        grad_b += affinity_backward(weight, c, scratch_.spatial()[p], grad) * scratch_.a()[p];
        grad_c += weight * grad;
      }
      grad_b = warp_sum(grad_b);
      grad_c = warp_sum(grad_c);
      if (lane_ == 0) {
        scratch_.grad_b()[q] = grad_b * sigmoid_backward(b);
        scratch_.grad_c()[q] = grad_c * sigmoid_backward(c);
      }
    }
    __syncthreads();
    for (int unit = warp_; unit < 3 * hidden_; unit += warps_) {
      const int kind = unit / hidden_, column = unit - kind * hidden_;
      const A* const weight = (kind == 2 ? weights_.ws4 : weights_.ws2) + column;
      const A* const grads = scratch_.grad_a() + kind * positions_;  // those of b and c follow
      A sum = A(0);
      for (int p = lane_; p < positions_; p += kLanes) sum += weight[static_cast<int64_t>(p) * hidden_] * grads[p];
      sum = warp_sum(sum);
      if (lane_ == 0) scratch_.grad_hidden()[unit] = relu_backward(scratch_.hidden()[unit], sum);
    }
    __syncthreads();
  }

  // Gradients of g and m by way of A, B and C.
  __device__ A grad_mean(int p) const {
    A sum = A(0);
    for (int j = 0; j < hidden_; ++j) {
      const int64_t at = static_cast<int64_t>(j) * positions_ + p;
      sum += scratch_.grad_hidden()[j] * weights_.ws1[at] + scratch_.grad_hidden()[2 * hidden_ + j] * weights_.ws3[at];
    }
    return sum;
  }

  __device__ A grad_peak(int p) const {
    A sum = A(0);
    for (int j = 0; j < hidden_; ++j) {
      sum += scratch_.grad_hidden()[hidden_ + j] * weights_.ws1[static_cast<int64_t>(j) * positions_ + p];
    }
    return sum;
  }

 private:
  const SpatialWeights<A>& weights_;
  const SpatialScratch<A, kBackward>& scratch_;
  const int positions_, hidden_, thread_, threads_, lane_, warp_, warps_;
};

}  // namespace dan_fast
