// The writes of a batch to one memory, last to first: how the loss changes with what they read. For `*_isa.cpp` files.
//
// With D_t the gradient of `before` of step t, held_u goes into before_t as G[t,u] held_u unless the slot was cleared
// between the two. So the rows t > u of D are zeroed where step u clears, after step u has read them: then
// sum_t G[t,u] D_t is the gradient of what the slots hold of key u, <w_u, D_t> that of G[t,u], and D_t in the end,
// zero wherever the memory from before the batch was gone, that of the scores.
#pragma once

#include "scan_cpu_loops.h"
#include "scan_cpu_writes.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// What the softmax of Eq. (7) leads to: grad_after and square_norm_grad get what the cosines of step t add.
template <typename T>
void evaluation_backward(
    int64_t size, const T* __restrict evaluation_grad, const T* __restrict evaluation, T mean,
    const T* __restrict before, const T* __restrict weights, const T* __restrict square_norms, T key_square,
    T* __restrict after_grad, T* __restrict square_norm_grad, T* __restrict key_grad) {
  for (int64_t i = 0; i < size; ++i) {
    const T after = score_after(before[i], weights[i], key_square);
    const CosineGrad<T> grad =
        raw_cosine_backward(evaluation[i] * (evaluation_grad[i] - mean), after, square_norms[i], key_square);
    after_grad[i] = grad.score;
    square_norm_grad[i] += grad.square_norm;
    key_grad[i] = grad.key_square;
  }
}

// `square_norm_grad` turns from that after the write to that before it; `weight_grad` grows.
template <typename T>
void add_key_backward(
    int64_t size, const T* __restrict after_grad, const T* __restrict before, const T* __restrict weights,
    T key_square, bool scalar_keys, T* __restrict square_norm_grad, T* __restrict weight_grad,
    T* __restrict before_grad, T* __restrict key_grad) {
  for (int64_t i = 0; i < size; ++i) {
    const WriteGrad<T> grad =
        write_backward(after_grad[i], square_norm_grad[i], before[i], weights[i], key_square, scalar_keys);
    before_grad[i] = grad.before;
    square_norm_grad[i] = grad.square_norm;
    weight_grad[i] += grad.weight;
    key_grad[i] += grad.key_square;
  }
}

template <typename T>
void shares_backward(
    int64_t size, const T* __restrict weight_grad, const T* __restrict evaluation, T gate,
    T* __restrict evaluation_grad, T* __restrict gate_grad) {
  for (int64_t i = 0; i < size; ++i) {
    evaluation_grad[i] = gate * weight_grad[i];
    gate_grad[i] = weight_grad[i] * write_weight_by_gate(evaluation[i], false);
  }
}

template <typename T>
class Reverse {
 public:
  // before_grad (steps, s) is D, to be filled. square_norm_grad (s,) comes in with respect to the memory after the
  // batch, and so does held_grad (steps, s), or null where nothing reads the memory after the batch. gram_grad is added
  // to; the rows of gram and gram_grad are gram_stride apart.
  Reverse(
      const MemoryBefore<T>& memory, const WriteRecord<T>& record, int64_t steps, const T* gram, int64_t gram_stride,
      T gate, bool scalar_keys, T* before_grad, T* square_norm_grad, T* held_grad, double* gram_grad,
      ParallelFor parallel)
      : memory_(memory), record_(record), slots_(memory.slots), chunks_(chunks_of(slots_)), steps_(steps),
        gram_(gram), gram_stride_(gram_stride), gate_(gate), scalar_keys_(scalar_keys), before_grad_(before_grad),
        square_norm_grad_(square_norm_grad), held_grad_(held_grad), gram_grad_(gram_grad), parallel_(parallel),
        evaluation_grad_(slots_), sums_(chunks_ * (steps + kOthers)) {}

  // Steps t = steps - 1 .. 0. The derivatives of the loss in the sums of V over FP and FN of step t, 0 without sets.
  void step_back(int64_t step, double by_false_positives, double by_false_negatives) {
    by_false_[0] = static_cast<T>(by_false_positives);
    by_false_[1] = static_cast<T>(by_false_negatives);
    for_chunks(slots_, parallel_, [&](const Chunk& chunk) { step_back(step, chunk); });
    // sums_ of a chunk: of G[t, step] for the steps after this one, then the others.
    const int64_t width = steps_ + kOthers;
    double others[kOthers] = {};
    for (int64_t c = 0; c < chunks_; ++c) {
      const double* sums = sums_.get() + c * width;
      for (int64_t t = step + 1; t < steps_; ++t) gram_grad_[t * gram_stride_ + step] += sums[t];
      for (int64_t k = 0; k < kOthers; ++k) others[k] += sums[steps_ + k];
    }
    gram_grad_[step * gram_stride_ + step] += others[kKey];
    gate_grad_ += others[kGate];
    evaluation_mean_ = static_cast<T>(others[kMean]);
  }

  // With respect to sigmoid(alpha), of the steps so far.
  double gate_grad() const { return gate_grad_; }

 private:
  enum Others { kKey, kGate, kMean, kOthers };

  template <typename Element>
  Element* row(Element* rows, int64_t step, const Chunk& chunk) const {
    return rows + step * slots_ + chunk.begin;
  }

  void step_back(int64_t step, const Chunk& chunk) {
    T before[kChunk], evaluation[kChunk], after_grad[kChunk], weight_grad[kChunk], key_grad[kChunk], gate_grad[kChunk];
    const int64_t size = chunk.size, later = steps_ - step - 1;
    const T key_square = gram_[step * gram_stride_ + step];
    const uint8_t* events = row(record_.events, step, chunk);
    const T* weights = row(record_.weights, step, chunk);
    T* grads = row(before_grad_, step, chunk);
    T* square_norm_grad = square_norm_grad_ + chunk.begin;
    T* evaluation_grad = evaluation_grad_.get() + chunk.begin;
    double* sums = sums_.get() + chunk.index * (steps_ + kOthers);

    int64_t happened[kChunk], count = 0;
    uint8_t any = 0;
    for (int64_t i = 0; i < size; ++i) any |= events[i];
    for (int64_t i = 0; any != 0 && i < size; ++i) {
      if (events[i] != 0) happened[count++] = i;
    }
    copy(row(record_.before, step, chunk), size, before);
    for (int64_t k = 0; k < count; ++k) before[happened[k]] = T(0);
    last_evaluation(step, chunk, evaluation);
    for (int64_t k = 0; k < count; ++k) {
      if (is_false(events[happened[k]])) evaluation[happened[k]] = T(0);
    }

    // What the steps after this one, and retrieval, have read of key `step`.
    if (held_grad_ != nullptr) {
      copy(row(held_grad_, step, chunk), size, weight_grad);
    } else {
      fill(weight_grad, size, T(0));
    }
    if (later > 0) {
      const T* column = gram_ + (step + 1) * gram_stride_ + step;
      add_products(size, 1, later, grads + slots_, slots_, column, 0, gram_stride_, weight_grad, 0);
      inner_products(size, later, grads + slots_, slots_, 1, weights, 0, sums + step + 1, 1, 0);
      evaluation_backward(
          size, evaluation_grad, row(record_.evaluation, step, chunk), evaluation_mean_, before, weights,
          row(record_.square_norms, step, chunk), key_square, after_grad, square_norm_grad, key_grad);
    } else {
      fill(after_grad, size, T(0));
      fill(key_grad, size, T(0));
    }
    add_key_backward(
        size, after_grad, before, weights, key_square, scalar_keys_, square_norm_grad, weight_grad, grads, key_grad);
    shares_backward(size, weight_grad, evaluation, gate_, evaluation_grad, gate_grad);

    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = happened[k];
      gate_grad[i] = weight_grad[i] * write_weight_by_gate(evaluation[i], (events[i] & kLeastUsed) != 0);
      if (is_false(events[i])) evaluation_grad[i] = T(0);
      grads[i] = square_norm_grad[i] = T(0);
    }
    for (int64_t t = step + 1; t < steps_; ++t) {
      for (int64_t k = 0; k < count; ++k) row(before_grad_, t, chunk)[happened[k]] = T(0);
    }
    for (int64_t u = 0; held_grad_ != nullptr && u < step; ++u) {
      for (int64_t k = 0; k < count; ++k) row(held_grad_, u, chunk)[happened[k]] = T(0);
    }
    for (int64_t k = 0; k < count; ++k) {
      if (is_false(events[happened[k]])) add_false_sample(step, chunk, happened[k], key_square, grads, key_grad);
    }
    sums[steps_ + kKey] = sum(key_grad, size);
    sums[steps_ + kGate] = sum(gate_grad, size);
    inner_products<1, 1>(size, evaluation, 0, evaluation_grad, 0, sums + steps_ + kMean, 0, 0);
  }

  static bool is_false(uint8_t events) { return (events & (kFalsePositive | kFalseNegative)) != 0; }

  // W^e as the write of `step` read it, but for the false samples.
  void last_evaluation(int64_t step, const Chunk& chunk, T* evaluation) const {
    if (step > 0) {
      copy(row(record_.evaluation, step - 1, chunk), chunk.size, evaluation);
      return;
    }
    const int64_t* labels = memory_.labels + chunk.begin;
    for (int64_t i = 0; i < chunk.size; ++i) {
      evaluation[i] = labels[i] >= 0 ? memory_.evaluation[chunk.begin + i] : T(0);
    }
  }

  // V of Eq. (14) reads the slot as it was before it was cleared.
  void add_false_sample(int64_t step, const Chunk& chunk, int64_t i, T key_square, T* grads, T* key_grad) const {
    const T* square_norms = step == 0 ? memory_.square_norms + chunk.begin : row(record_.square_norms, step - 1, chunk);
    const T score = row(record_.before, step, chunk)[i];
    const T weight = exp_of_cosine(on_grid(raw_cosine(score, square_norms[i], norm_from_square(key_square))));
    const bool positive = (row(record_.events, step, chunk)[i] & kFalsePositive) != 0;
    const CosineGrad<T> grad =
        raw_cosine_backward(weight * by_false_[positive ? 0 : 1], score, square_norms[i], key_square);
    grads[i] += grad.score;
    square_norm_grad_[chunk.begin + i] += grad.square_norm;
    key_grad[i] += grad.key_square;
  }

  const MemoryBefore<T> memory_;
  const WriteRecord<T> record_;
  const int64_t slots_, chunks_, steps_;
  const T* const gram_;
  const int64_t gram_stride_;
  const T gate_;
  const bool scalar_keys_;
  T* const before_grad_;
  T* const square_norm_grad_;
  T* const held_grad_;
  double* const gram_grad_;
  const ParallelFor parallel_;
  double gate_grad_ = 0.0;
  T by_false_[2] = {};
  T evaluation_mean_ = T(0);    // sum of W^e times its gradient, of the step to come
  Scratch<T> evaluation_grad_;  // of the step to come
  Scratch<double> sums_;
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
