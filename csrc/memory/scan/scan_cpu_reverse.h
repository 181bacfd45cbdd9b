// The writes of a batch to one memory, last to first: how the loss changes with what they read. For `*_isa.cpp` files.
//
// With D_t the gradient of `before` of step t, held_u goes into before_t as G[t,u] held_u unless the slot was cleared
// between the two. So the rows t > u of D are zeroed where step u clears, after step u has read them: then
// sum_t G[t,u] D_t is the gradient of what the slots hold of key u, <w_u, D_t> that of G[t,u], and D_t in the end,
// zero wherever the memory from before the batch was gone, that of the scores.
#pragma once

#include "../cpu_loops.h"
#include "scan_cpu_writes.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// What the softmax of Eq. (7) leads to: grad_after and grad_square_norm get what the cosines of step t add.
template <typename T>
void evaluation_backward(
    int64_t size, const T* __restrict grad_evaluation, const T* __restrict evaluation, T mean,
    const T* __restrict before, const T* __restrict weights, const T* __restrict square_norms, T key_square,
    T* __restrict grad_after, T* __restrict grad_square_norm, T* __restrict grad_key) {
  for (int64_t i = 0; i < size; ++i) {
    const T after = score_after(before[i], weights[i], key_square);
    const CosineGrad<T> grad =
        raw_cosine_backward(evaluation[i] * (grad_evaluation[i] - mean), after, square_norms[i], key_square);
    grad_after[i] = grad.score;
    grad_square_norm[i] += grad.square_norm;
    grad_key[i] = grad.key_square;
  }
}

// `grad_square_norm` turns from that after the write to that before it; `grad_weight` grows.
template <typename T>
void add_key_backward(
    int64_t size, const T* __restrict grad_after, const T* __restrict before, const T* __restrict weights,
    T key_square, bool scalar_keys, T* __restrict grad_square_norm, T* __restrict grad_weight,
    T* __restrict grad_before, T* __restrict grad_key) {
  for (int64_t i = 0; i < size; ++i) {
    const WriteGrad<T> grad =
        write_backward(grad_after[i], grad_square_norm[i], before[i], weights[i], key_square, scalar_keys);
    grad_before[i] = grad.before;
    grad_square_norm[i] = grad.square_norm;
    grad_weight[i] += grad.weight;
    grad_key[i] += grad.key_square;
  }
}

template <typename T>
void shares_backward(
    int64_t size, const T* __restrict grad_weight, const T* __restrict evaluation, T gate,
    T* __restrict grad_evaluation, T* __restrict grad_gate) {
  for (int64_t i = 0; i < size; ++i) {
    grad_evaluation[i] = gate * grad_weight[i];
    grad_gate[i] = grad_weight[i] * write_weight_grad_gate(evaluation[i], false);
  }
}

template <typename T>
class Reverse {
 public:
  // grad_before (steps, s) is D, to be filled. grad_square_norm (s,) comes in with respect to the memory after the
  // batch, and so does grad_held (steps, s), or null where nothing reads the memory after the batch. grad_gram is added
  // to; the rows of gram and grad_gram are gram_stride apart.
  Reverse(
      const MemoryBefore<T>& memory, const WriteRecord<T>& record, int64_t steps, const T* gram, int64_t gram_stride,
      T gate, bool scalar_keys, T* grad_before, T* grad_square_norm, T* grad_held, double* grad_gram,
      ParallelFor parallel)
      : memory_(memory), record_(record), slots_(memory.slots), chunks_(chunks_of(slots_)), steps_(steps),
        gram_(gram), gram_stride_(gram_stride), gate_(gate), scalar_keys_(scalar_keys), grad_before_(grad_before),
        grad_square_norm_(grad_square_norm), grad_held_(grad_held), grad_gram_(grad_gram), parallel_(parallel),
        grad_evaluation_(slots_), sums_(chunks_ * (steps + kOthers)) {}

  // Steps t = steps - 1 .. 0. The derivatives of the loss in the sums of V over FP and FN of step t, 0 without sets.
  void step_back(int64_t step, double grad_false_positives, double grad_false_negatives) {
    grad_false_[0] = static_cast<T>(grad_false_positives);
    grad_false_[1] = static_cast<T>(grad_false_negatives);
    for_chunks(slots_, parallel_, [&](const Chunk& chunk) { step_back(step, chunk); });
    // sums_ of a chunk: of G[t, step] for the steps after this one, then the others.
    const int64_t width = steps_ + kOthers;
    double others[kOthers] = {};
    for (int64_t c = 0; c < chunks_; ++c) {
      const double* sums = sums_.get() + c * width;
      for (int64_t t = step + 1; t < steps_; ++t) grad_gram_[t * gram_stride_ + step] += sums[t];
      for (int64_t k = 0; k < kOthers; ++k) others[k] += sums[steps_ + k];
    }
    grad_gram_[step * gram_stride_ + step] += others[kKey];
    grad_gate_ += others[kGate];
    evaluation_mean_ = static_cast<T>(others[kMean]);
  }

  // With respect to sigmoid(alpha), of the steps so far.
  double grad_gate() const { return grad_gate_; }

 private:
  enum Others { kKey, kGate, kMean, kOthers };

  template <typename Element>
  Element* row(Element* rows, int64_t step, const Chunk& chunk) const {
    return rows + step * slots_ + chunk.begin;
  }

  void step_back(int64_t step, const Chunk& chunk) {
    T before[kChunk], evaluation[kChunk], grad_after[kChunk], grad_weight[kChunk], grad_key[kChunk], grad_gate[kChunk];
    const int64_t size = chunk.size, later = steps_ - step - 1;
    const T key_square = gram_[step * gram_stride_ + step];
    const uint8_t* events = row(record_.events, step, chunk);
    const T* weights = row(record_.weights, step, chunk);
    T* grads = row(grad_before_, step, chunk);
    T* grad_square_norm = grad_square_norm_ + chunk.begin;
    T* grad_evaluation = grad_evaluation_.get() + chunk.begin;
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
    if (grad_held_ != nullptr) {
      copy(row(grad_held_, step, chunk), size, grad_weight);
    } else {
      fill(grad_weight, size, T(0));
    }
    if (later > 0) {
      const T* column = gram_ + (step + 1) * gram_stride_ + step;
      add_products(size, 1, later, grads + slots_, slots_, column, 0, gram_stride_, grad_weight, 0);
      inner_products(size, later, grads + slots_, slots_, 1, weights, 0, sums + step + 1, 1, 0);
      evaluation_backward(
          size, grad_evaluation, row(record_.evaluation, step, chunk), evaluation_mean_, before, weights,
          row(record_.square_norms, step, chunk), key_square, grad_after, grad_square_norm, grad_key);
    } else {
      fill(grad_after, size, T(0));
      fill(grad_key, size, T(0));
    }
    add_key_backward(
        size, grad_after, before, weights, key_square, scalar_keys_, grad_square_norm, grad_weight, grads, grad_key);
    shares_backward(size, grad_weight, evaluation, gate_, grad_evaluation, grad_gate);

    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = happened[k];
      grad_gate[i] = grad_weight[i] * write_weight_grad_gate(evaluation[i], (events[i] & kLeastUsed) != 0);
      if (is_false(events[i])) grad_evaluation[i] = T(0);
      grads[i] = grad_square_norm[i] = T(0);
    }
    for (int64_t t = step + 1; t < steps_; ++t) {
      for (int64_t k = 0; k < count; ++k) row(grad_before_, t, chunk)[happened[k]] = T(0);
    }
    for (int64_t u = 0; grad_held_ != nullptr && u < step; ++u) {
      for (int64_t k = 0; k < count; ++k) row(grad_held_, u, chunk)[happened[k]] = T(0);
    }
    for (int64_t k = 0; k < count; ++k) {
      if (is_false(events[happened[k]])) add_false_sample(step, chunk, happened[k], key_square, grads, grad_key);
    }
    sums[steps_ + kKey] = sum(grad_key, size);
    sums[steps_ + kGate] = sum(grad_gate, size);
    inner_products<1, 1>(size, evaluation, 0, grad_evaluation, 0, sums + steps_ + kMean, 0, 0);
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
  void add_false_sample(int64_t step, const Chunk& chunk, int64_t i, T key_square, T* grads, T* grad_key) const {
    const T* square_norms = step == 0 ? memory_.square_norms + chunk.begin : row(record_.square_norms, step - 1, chunk);
    const T score = row(record_.before, step, chunk)[i];
    const T weight = exp_of_cosine(on_grid(raw_cosine(score, square_norms[i], norm_from_square(key_square))));
    const bool positive = (row(record_.events, step, chunk)[i] & kFalsePositive) != 0;
    const CosineGrad<T> grad =
        raw_cosine_backward(weight * grad_false_[positive ? 0 : 1], score, square_norms[i], key_square);
    grads[i] += grad.score;
    grad_square_norm_[chunk.begin + i] += grad.square_norm;
    grad_key[i] += grad.key_square;
  }

  const MemoryBefore<T> memory_;
  const WriteRecord<T> record_;
  const int64_t slots_, chunks_, steps_;
  const T* const gram_;
  const int64_t gram_stride_;
  const T gate_;
  const bool scalar_keys_;
  T* const grad_before_;
  T* const grad_square_norm_;
  T* const grad_held_;
  double* const grad_gram_;
  const ParallelFor parallel_;
  double grad_gate_ = 0.0;
  T grad_false_[2] = {};
  T evaluation_mean_ = T(0);    // sum of W^e times its gradient, of the step to come
  Scratch<T> grad_evaluation_;  // of the step to come
  Scratch<double> sums_;
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
