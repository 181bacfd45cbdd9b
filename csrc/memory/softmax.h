// Attention of a batch of keys over the slots of a memory, from scores: exp(cos) normalised over the occupied slots,
// Eqs. (7) and (11), and its derivative. What happens to one element stands here; softmax_cpu_isa.cpp and softmax.cuh
// hold the loops. Plain C++17.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"
#include "rules.h"

namespace dan_fast {

// T is float or double; every array is contiguous.
template <typename T>
struct SlotScores {
  int64_t rows, slots;    // B, s
  const T* scores;        // (B, s) <k_b, m_i>
  const T* square_norms;  // (s,) |m_i|^2
  const T* key_squares;   // (B,) |k_b|^2
};

template <typename T>
struct SoftmaxGradient {
  const T* grad;     // (B, s) with respect to the weights
  const T* weights;  // (B, s) the result; exactly 0 where a slot is empty
  T* scores;         // (B, s) out, as are the rest
  T* square_norms;   // (s,)
  T* key_squares;    // (B,)
};

// max(|k|, 1e-12), or NaN if |k|^2 is not finite: the weights of that key are then NaN, not a guess.
template <typename T>
DAN_FAST_HD T finite_key_length(T key_square) {
  return norm_from_square(key_square) + (key_square - key_square);
}

// exp(cos(k, m)), a number in [1/e, e]: an occupied slot never has weight 0.
template <typename T>
DAN_FAST_HD T attention(T score, T square_norm, T key_length) {
  return exp_of_cosine(on_grid(raw_cosine(score, square_norm, key_length)));
}

// `total` is 0 if no slot is occupied.
template <typename T>
DAN_FAST_HD T normalised(T exponential, T total) {
  return exponential == T(0) ? T(0) : exponential / total;
}

// A weight's term of sum_i w_i g_i. The gradient at an empty slot, infinite for a loss like log w, counts for nothing.
template <typename T>
DAN_FAST_HD T weighted_gradient(T weight, T grad) {
  return weight == T(0) ? T(0) : weight * grad;
}

// Derivative in what the cosine of one slot is made of; `grad_mean` is sum_i w_i g_i over the row.
template <typename T>
DAN_FAST_HD CosineGrad<T> attention_backward(
    T weight, T grad, T grad_mean, T score, T square_norm, T key_square) {
  const T grad_cosine = weight * (grad - grad_mean);
  const CosineGrad<T> result = raw_cosine_backward(grad_cosine, score, square_norm, key_square);
  const bool empty = weight == T(0);
  return {empty ? T(0) : result.score, empty ? T(0) : result.square_norm, empty ? T(0) : result.key_square};
}

// Slots that slot_softmax_backward takes at a time.
constexpr int64_t kSoftmaxBlock = 512;

// Ranges may run at the same time, and results have the same bits whatever the ranges and the instruction set.
#define DAN_FAST_DECLARE_SOFTMAX(isa)                                                                          \
  namespace isa {                                                                                              \
  /* Rows [first, last) of weights (B, s); occupied (s,) 0 or 1, or null: every slot is. */                    \
  template <typename T>                                                                                        \
  void slot_softmax(const SlotScores<T>& in, const uint8_t* occupied, T* weights, int64_t first, int64_t last);   \
  /* means (B,) = sum_i w_i g_i for rows [first, last). */                                                     \
  template <typename T>                                                                                        \
  void mean_gradients(const SoftmaxGradient<T>& gradient, int64_t slots, T* means, int64_t first, int64_t last); \
  /* Blocks [first, last) of kSoftmaxBlock slots: the gradients of scores and square_norms, and what each block \
     adds to those of key_squares, key_parts (blocks, B). */                                                   \
  template <typename T>                                                                                        \
  void slot_softmax_backward(const SlotScores<T>& in, const SoftmaxGradient<T>& gradient, const T* means,      \
                             double* key_parts, int64_t first, int64_t last);                                  \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_SOFTMAX)
#undef DAN_FAST_DECLARE_SOFTMAX

// On CUDA: launch on `stream` (a cudaStream_t) of the current device and do not wait. Return a cudaError_t. `means` has
// room for B numbers.
template <typename T>
int launch_slot_softmax(const SlotScores<T>& in, const uint8_t* occupied, T* weights, void* stream);
template <typename T>
int launch_slot_softmax_backward(
    const SlotScores<T>& in, const SoftmaxGradient<T>& gradient, T* means, void* stream);

}  // namespace dan_fast
