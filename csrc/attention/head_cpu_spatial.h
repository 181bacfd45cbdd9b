// Spatial attention of one sample and its derivative on the CPU, Eqs. (3)-(4): small next to the passes over the map,
// and in the same order of additions in every instruction set. As internal to an instruction set as head_cpu_tile.h.
#pragma once

#include "head_cpu_tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// A, B, C of Eq. (3) and what lies under them, for one sample after the other.
template <typename A>
class SpatialAttention {
 public:
  SpatialAttention(const SpatialWeights<A>& weights, int64_t positions)
      : weights_(weights), positions_(positions), padded_(round_up(positions, kLanes<A>)), size_(weights.hidden),
        ws2_(size_ * padded_), ws4_(size_ * padded_), gates_(3 * padded_), hidden_(3 * size_), totals_(padded_),
        weighted_(padded_), terms_(padded_), shares_(padded_), by_gates_(3 * padded_) {
    turn_over(weights.ws2, ws2_.numbers);
    turn_over(weights.ws4, ws4_.numbers);
  }

  // A_S (P,) from g and m.
  void forward(const A* mean_map, const A* peak_map, A* spatial_attention) {
    find_gates(mean_map, peak_map);
    normalisers();
    for (int64_t p = 0; p < positions_; ++p) spatial_attention[p] = weighted_.numbers[p] / totals_.numbers[p];
  }

  // Adds to mean_map_grad (P,), sets peak_map_grad (P,); `gates` (3, P) and `hidden` (6, h) are one sample's of
  // SpatialGradients.
  void backward(const A* mean_map, const A* peak_map, const A* spatial_attention, const A* grad, A* mean_map_grad,
                A* peak_map_grad, A* gates, A* hidden) {
    find_gates(mean_map, peak_map);
    normalisers();
    differentiate_softmax(spatial_attention, grad);
    for (int64_t i = 0; i < 3; ++i) {
      A* by_gate = by_gates_.numbers + i * padded_;
      const A* gate = gates_.numbers + i * padded_;
      for (int64_t p = 0; p < positions_; ++p) gates[i * positions_ + p] = by_gate[p] * sigmoid_backward(gate[p]);
    }
    std::copy_n(hidden_.numbers, 3 * size_, hidden);
    A* by_hidden = hidden + 3 * size_;
    for (int64_t k = 0; k < size_; ++k) {
      const A *ws2 = ws2_.numbers + k * padded_, *ws4 = ws4_.numbers + k * padded_;
      by_hidden[k] = relu_backward(hidden[k], dot(ws2, static_cast<const A*>(gates), positions_));
      by_hidden[size_ + k] =
          relu_backward(hidden[size_ + k], dot(ws2, static_cast<const A*>(gates + positions_), positions_));
      by_hidden[2 * size_ + k] =
          relu_backward(hidden[2 * size_ + k], dot(ws4, static_cast<const A*>(gates + 2 * positions_), positions_));
    }
    std::fill_n(peak_map_grad, positions_, A(0));
    for (int64_t k = 0; k < size_; ++k) {
      add_multiple(positions_, by_hidden[k], weights_.ws1 + k * positions_, mean_map_grad);
      add_multiple(positions_, by_hidden[size_ + k], weights_.ws1 + k * positions_, peak_map_grad);
      add_multiple(positions_, by_hidden[2 * size_ + k], weights_.ws3 + k * positions_, mean_map_grad);
    }
  }

 private:
  // (P, h) as (h, P), with zeros up to a whole number of vectors.
  void turn_over(const A* matrix, A* turned) const {
    std::fill_n(turned, size_ * padded_, A(0));
    for (int64_t p = 0; p < positions_; ++p) {
      for (int64_t k = 0; k < size_; ++k) turned[k * padded_ + p] = matrix[p * size_ + k];
    }
  }

  void find_gates(const A* mean_map, const A* peak_map) {
    bottleneck(mean_map, weights_.ws1, ws2_.numbers, 0);
    bottleneck(peak_map, weights_.ws1, ws2_.numbers, 1);
    bottleneck(mean_map, weights_.ws3, ws4_.numbers, 2);
  }

  void bottleneck(const A* map, const A* reduce, const A* expand, int64_t which) {
    A *hidden = hidden_.numbers + which * size_, *gate = gates_.numbers + which * padded_;
    std::fill_n(gate, padded_, A(0));
    for (int64_t k = 0; k < size_; ++k) {
      hidden[k] = relu(dot(reduce + k * positions_, map, positions_));
      add_multiple(padded_, hidden[k], expand + k * padded_, gate);
    }
    for (int64_t p = 0; p < padded_; ++p) gate[p] = sigmoid(gate[p]);
  }

  // totals_p = sum over q of affinity(A_p, B_q), weighted_p = the same with C_q.
  void normalisers() {
    const A *b = gates_.numbers + padded_, *c = b + padded_;
    std::fill_n(totals_.numbers, padded_, A(0));
    std::fill_n(weighted_.numbers, padded_, A(0));
    for (int64_t q = 0; q < positions_; ++q) {
      add_affinities(b[q], c[q], gates_.numbers, totals_.numbers, weighted_.numbers);
    }
  }

  void add_affinities(A b, A c, const A* __restrict a, A* __restrict totals, A* __restrict weighted) const {
    for (int64_t p = 0; p < padded_; ++p) {
      const A value = affinity(a[p], b);
      totals[p] += value;
      weighted[p] += value * c;
    }
  }

  void differentiate_softmax(const A* spatial_attention, const A* grad) {
    const A *a = gates_.numbers, *b = a + padded_, *c = b + padded_;
    A *by_a = by_gates_.numbers, *by_b = by_a + padded_, *by_c = by_b + padded_;
    std::fill_n(by_a, positions_, A(0));
    for (int64_t q = 0; q < positions_; ++q) {
      column(b[q], c[q], a, totals_.numbers, spatial_attention, grad, shares_.numbers, terms_.numbers, by_a);
      by_b[q] = dot(static_cast<const A*>(terms_.numbers), a, positions_);
      by_c[q] = dot(static_cast<const A*>(shares_.numbers), grad, positions_);
    }
  }

  // S_pq and the gradient of A_p B_q for one q.
  void column(A b, A c, const A* __restrict a, const A* __restrict totals, const A* __restrict spatial_attention,
              const A* __restrict grad, A* __restrict shares, A* __restrict terms, A* __restrict by_a) const {
    for (int64_t p = 0; p < positions_; ++p) {
      const A share = affinity(a[p], b) / totals[p];
      const A term = affinity_backward(share, c, spatial_attention[p], grad[p]);
      shares[p] = share;
      terms[p] = term;
      by_a[p] += term * b;
    }
  }

  const SpatialWeights<A> weights_;
  // Rows of P numbers are `padded_` apart, whole vectors: what stands beyond P is computed, but never looked at.
  const int64_t positions_, padded_, size_;
  Scratch<A> ws2_, ws4_;                           // (h, P)
  Scratch<A> gates_;                               // (3, P) A, B, C
  Scratch<A> hidden_;                              // (3, h)
  Scratch<A> totals_, weighted_, terms_, shares_;  // (P,)
  Scratch<A> by_gates_;                            // (3, P)
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
