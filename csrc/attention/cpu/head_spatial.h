// Spatial attention of one sample and its derivative on the CPU, Eqs. (3)-(4): small next to the passes over the map,
// and in the same order of additions in every instruction set. As internal to an instruction set as head_tile.h.
#pragma once

#include "head_tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// A, B, C of Eq. (3) and what lies under them, for one sample after the other.
template <typename A>
class SpatialAttention {
 public:
  // Inlined, it takes registers from the loops over the map.
  __attribute__((noinline)) SpatialAttention(const SpatialWeights<A>& weights, int64_t positions)
      : weights_(weights), positions_(positions), padded_(round_up(positions, kLanes<A>)), size_(weights.hidden),
        ws2_(size_ * padded_), ws4_(size_ * padded_), gates_(3 * padded_), hidden_(3 * size_), totals_(padded_),
        weighted_(padded_), terms_(padded_), shares_(padded_), grad_gates_(3 * padded_) {
    turn_over(weights.ws2, ws2_.get());
    turn_over(weights.ws4, ws4_.get());
  }

  // A_S (P,) from g and m.
  void forward(const A* mean_map, const A* peak_map, A* spatial_attention) {
    find_gates(mean_map, peak_map);
    normalisers();
    for (int64_t p = 0; p < positions_; ++p) spatial_attention[p] = weighted_.get()[p] / totals_.get()[p];
  }

  // Adds to grad_mean_map (P,), sets grad_peak_map (P,); `gates` (3, P) and `hidden` (6, h) are one sample's of
  // SpatialGradients.
  void backward(const A* mean_map, const A* peak_map, const A* spatial_attention, const A* grad, A* grad_mean_map,
                A* grad_peak_map, A* gates, A* hidden) {
    find_gates(mean_map, peak_map);
    normalisers();
    differentiate_softmax(spatial_attention, grad);
    for (int64_t i = 0; i < 3; ++i) {
      A* grad_gate = grad_gates_.get() + i * padded_;
      const A* gate = gates_.get() + i * padded_;
      for (int64_t p = 0; p < positions_; ++p) gates[i * positions_ + p] = grad_gate[p] * sigmoid_backward(gate[p]);
    }
    std::copy_n(hidden_.get(), 3 * size_, hidden);
    A* grad_hidden = hidden + 3 * size_;
    for (int64_t k = 0; k < size_; ++k) {
      const A *ws2 = ws2_.get() + k * padded_, *ws4 = ws4_.get() + k * padded_;
      grad_hidden[k] = relu_backward(hidden[k], dot(ws2, static_cast<const A*>(gates), positions_));
      grad_hidden[size_ + k] =
          relu_backward(hidden[size_ + k], dot(ws2, static_cast<const A*>(gates + positions_), positions_));
      grad_hidden[2 * size_ + k] =
          relu_backward(hidden[2 * size_ + k], dot(ws4, static_cast<const A*>(gates + 2 * positions_), positions_));
    }
    std::fill_n(grad_peak_map, positions_, A(0));
    for (int64_t k = 0; k < size_; ++k) {
      add_multiple(positions_, grad_hidden[k], weights_.ws1 + k * positions_, grad_mean_map);
      add_multiple(positions_, grad_hidden[size_ + k], weights_.ws1 + k * positions_, grad_peak_map);
      add_multiple(positions_, grad_hidden[2 * size_ + k], weights_.ws3 + k * positions_, grad_mean_map);
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
    bottleneck(mean_map, weights_.ws1, ws2_.get(), 0);
    bottleneck(peak_map, weights_.ws1, ws2_.get(), 1);
    bottleneck(mean_map, weights_.ws3, ws4_.get(), 2);
  }

  void bottleneck(const A* map, const A* reduce, const A* expand, int64_t which) {
    A *hidden = hidden_.get() + which * size_, *gate = gates_.get() + which * padded_;
    std::fill_n(gate, padded_, A(0));
    for (int64_t k = 0; k < size_; ++k) {
      hidden[k] = relu(dot(reduce + k * positions_, map, positions_));
      add_multiple(padded_, hidden[k], expand + k * padded_, gate);
    }
    for (int64_t p = 0; p < padded_; ++p) gate[p] = sigmoid(gate[p]);
  }

  // totals_p = sum over q of affinity(A_p, B_q), weighted_p = the same with C_q.
  void normalisers() {
    const A *b = gates_.get() + padded_, *c = b + padded_;
    std::fill_n(totals_.get(), padded_, A(0));
    std::fill_n(weighted_.get(), padded_, A(0));
    for (int64_t q = 0; q < positions_; ++q) {
      add_affinities(b[q], c[q], gates_.get(), totals_.get(), weighted_.get());
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
    const A *a = gates_.get(), *b = a + padded_, *c = b + padded_;
    A *grad_a = grad_gates_.get(), *grad_b = grad_a + padded_, *grad_c = grad_b + padded_;
    std::fill_n(grad_a, positions_, A(0));
    for (int64_t q = 0; q < positions_; ++q) {
      column(b[q], c[q], a, totals_.get(), spatial_attention, grad, shares_.get(), terms_.get(), grad_a);
      grad_b[q] = dot(static_cast<const A*>(terms_.get()), a, positions_);
      grad_c[q] = dot(static_cast<const A*>(shares_.get()), grad, positions_);
    }
  }

  // S_pq and the gradient of A_p B_q for one q.
  void column(A b, A c, const A* __restrict a, const A* __restrict totals, const A* __restrict spatial_attention,
              const A* __restrict grad, A* __restrict shares, A* __restrict terms, A* __restrict grad_a) const {
    for (int64_t p = 0; p < positions_; ++p) {
      const A share = affinity(a[p], b) / totals[p];
      const A term = affinity_backward(share, c, spatial_attention[p], grad[p]);
      shares[p] = share;
      terms[p] = term;
      grad_a[p] += term * b;
    }
  }

  const SpatialWeights<A> weights_;
  // Rows of P numbers are `padded_` apart, whole vectors: what stands beyond P is computed, but never looked at.
  const int64_t positions_, padded_, size_;
  Scratch<A> ws2_, ws4_;                           // (h, P)
  Scratch<A> gates_;                               // (3, P) A, B, C
  Scratch<A> hidden_;                              // (3, h)
  Scratch<A> totals_, weighted_, terms_, shares_;  // (P,)
  Scratch<A> grad_gates_;                            // (3, P)
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
