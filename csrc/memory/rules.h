// The rules of the progressive augmentation memory for one slot, in score space: Eqs. (5)-(16) of the paper, which
// docs/fidelity.md follows step by step. They are written once: the CPU and the CUDA scan differ only in how they walk
// the slots and add them up.
//
// This room is compiled without contracting a * b + c (-ffp-contract=off, nvcc -fmad=false): a rule then gives the same
// bits on every path, and equal histories stay exact ties. Sums over slots are added in an order of each device's own,
// so that usage agrees between devices to rounding.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/math.h"

namespace dan_fast {

// Why a batch may not be written; bits of the flag that a scan returns.
enum Fault : int32_t {
  kFaultKeys = 1,
  kFaultUnlabeledKeys = 2,
  kFaultLabels = 4,
  kFaultSampleIds = 8,
  kFaultAlpha = 16,
  kFaultAlphaUnlabeled = 32,
  kFaultBeta = 64,
  kFaultLeastUsed = 128,
  kFaultLeastUsedUnlabeled = 256,
};

// What step t does to a slot; bits of a record's `events`. A slot with any of them is cleared before the write.
enum Event : uint8_t {
  kFalsePositive = 1,  // FP of Eq. (14)
  kFalseNegative = 2,  // FN
  kLeastUsed = 4,      // Eq. (9): the slot that takes the label
};

// Cosines are multiples of 1 / steps, so that a tie is a tie however they were computed.
template <typename T>
struct Grid;
template <>
struct Grid<float> {
  using Key = int32_t;
  static constexpr float kSteps = 4194304.0f;  // 2^22
  static constexpr int kKeyBits = 24;
};
template <>
struct Grid<double> {
  using Key = int64_t;
  static constexpr double kSteps = 1099511627776.0;  // 2^40
  static constexpr int kKeyBits = 42;
};

// Whether argmin takes `a` rather than `b`, wherever they stand: NaN comes before all numbers.
template <typename T>
DAN_FAST_HD bool is_less(T a, T b) {
  return a < b || (a != a && b == b);
}

// max(|m|, 1e-12) from |m|^2.
template <typename T>
DAN_FAST_HD T norm_from_square(T square) {
  const T floor = T(1e-12) * T(1e-12);
  return std::sqrt(square < floor ? floor : square);
}

// cos(k, m) as the quotient gives it; the derivative is taken of this.
template <typename T>
DAN_FAST_HD T raw_cosine(T score, T square_norm, T key_length) {
  return score / (norm_from_square(square_norm) * key_length);
}

// The nearest grid point in [-1, 1], ties to even: rounding errors may not push a cosine out of the range of
// exp_of_cosine. Additions round as nearbyint does, and every instruction set has them.
template <typename T>
DAN_FAST_HD T on_grid(T cosine) {
  const T bounded = cosine < T(-1) ? T(-1) : cosine > T(1) ? T(1) : cosine;
  return ((bounded * Grid<T>::kSteps + kWhole<T>) - kWhole<T>) / Grid<T>::kSteps;
}

// 0 .. 2^(kKeyBits - 1), increasing with the cosine; `cosine` is on the grid.
template <typename T>
DAN_FAST_HD typename Grid<T>::Key order_key(T cosine) {
  return static_cast<typename Grid<T>::Key>((cosine + T(1)) * Grid<T>::kSteps);
}

// Eq. (8): the share of the key that goes to a slot whose last evaluation is `evaluation`. A gate of 1 leaves exactly
// that, so that slots which tie go on to do so.
template <typename T>
DAN_FAST_HD T write_weight(T evaluation, bool is_least_used, T gate) {
  return gate * evaluation + (is_least_used ? T(1) - gate : T(0));
}

// Its derivative in the gate; that in the evaluation is the gate.
template <typename T>
DAN_FAST_HD T write_weight_grad_gate(T evaluation, bool is_least_used) {
  return evaluation - (is_least_used ? T(1) : T(0));
}

// <k, m> after m += weight k.
template <typename T>
DAN_FAST_HD T score_after(T before, T weight, T key_square) {
  return before + weight * key_square;
}

// |m|^2 after m += weight k: n2 + 2 w <k, m> + w^2 <k, k>. `scalar_keys` says that d = 1: numbers of opposite sign
// nearly cancel now and then, vectors do not, and n2 would lose twice the digits that m loses; but then <k, m> = k m.
template <typename T>
DAN_FAST_HD T square_norm_after(T square_norm, T before, T after, T weight, T key_square, bool scalar_keys) {
  if (scalar_keys && key_square > T(0)) return after * after / key_square;
  return square_norm + weight * (before + after);
}

// Eqs. (5) and (12); `trust` is 1 for M, beta for M'.
template <typename T>
DAN_FAST_HD T usage_after(T usage, T decay, T evaluation, T weight, T trust) {
  return decay * usage + (trust * evaluation + weight);
}

// Derivative of raw_cosine, times `grad`.
template <typename T>
struct CosineGrad {
  T score, square_norm, key_square;
};

template <typename T>
DAN_FAST_HD CosineGrad<T> raw_cosine_backward(T grad, T score, T square_norm, T key_square) {
  const T floor = T(1e-12) * T(1e-12);
  const T norm = norm_from_square(square_norm), length = norm_from_square(key_square);
  const T per_score = grad / (norm * length);
  const T half = T(-0.5) * per_score * score;
  // Where the floor acts the norm is a constant.
  return {per_score, square_norm < floor ? T(0) : half / square_norm, key_square < floor ? T(0) : half / key_square};
}

// Derivative of score_after and square_norm_after, times the gradients of their results.
template <typename T>
struct WriteGrad {
  T before, square_norm, weight, key_square;
};

template <typename T>
DAN_FAST_HD WriteGrad<T> write_backward(
    T grad_after, T grad_square_norm, T before, T weight, T key_square, bool scalar_keys) {
  const T after = score_after(before, weight, key_square);
  WriteGrad<T> grad = {T(0), T(0), T(0), T(0)};
  if (scalar_keys && key_square > T(0)) {
    const T ratio = after / key_square;
    grad_after += grad_square_norm * T(2) * ratio;
    grad.key_square = -grad_square_norm * ratio * ratio;
  } else {
    grad.square_norm = grad_square_norm;
    grad.weight = grad_square_norm * (before + after);
    grad.before = grad_square_norm * weight;
    grad_after += grad_square_norm * weight;
  }
  grad.before += grad_after;
  grad.weight += grad_after * key_square;
  grad.key_square += grad_after * weight;
  return grad;
}

// -log(p / (p + n)), Eqs. (15) and (16), and its derivatives. p > 0.
template <typename T>
DAN_FAST_HD T share_loss(T p, T n) {
  return std::log((p + n) / p);
}

template <typename T>
DAN_FAST_HD T share_loss_grad_p(T p, T n) {
  return -n / (p * (p + n));
}

template <typename T>
DAN_FAST_HD T share_loss_grad_n(T p, T n) {
  return T(1) / (p + n);
}

}  // namespace dan_fast
