// What a thread of the CUDA scan does to a slot of its own, forward. No PyTorch.
#pragma once

#include "scan.h"

namespace dan_fast {

// One memory and the keys that are written to it. The state of a slot lies in `after` from the start; only the thread
// that owns the slot touches it.
template <typename T>
struct Writes {
  MemoryBefore<T> before;
  MemoryAfter<T> after;
  WriteRecord<T> record;
  const T* scores;  // (steps or more, s)
  const T* gram;    // row t, column u at t * gram_stride + u
  int64_t gram_stride, steps;
  T gate, decay, trust;
  bool scalar_keys;

  __device__ T key_square(int64_t t) const { return gram[t * gram_stride + t]; }

  __device__ __forceinline__ void leave_as_it_was(int64_t i) const {
    after.square_norms[i] = before.square_norms[i];
    after.usage[i] = before.usage[i];
    after.evaluation[i] = before.evaluation[i];
    after.labels[i] = before.labels[i];
    after.sample_ids[i] = before.sample_ids[i];
    after.kept[i] = T(1);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = t * before.slots + i;
      after.held[at] = T(0);
      record.before[at] = T(0);
      record.weights[at] = T(0);
      record.evaluation[at] = T(0);
      record.square_norms[at] = T(0);
      record.events[at] = 0;
    }
  }

  __device__ __forceinline__ void begin(int64_t i) const {
    after.square_norms[i] = before.square_norms[i];
    after.usage[i] = before.usage[i];
    after.labels[i] = before.labels[i];
    after.evaluation[i] = before.labels[i] >= 0 ? before.evaluation[i] : T(0);
    after.sample_ids[i] = before.sample_ids[i];
    after.kept[i] = T(1);
  }

  // <k_row, m_i> when `written` keys have been written.
  __device__ __forceinline__ T score(int64_t row, int64_t written, int64_t i) const {
    const T* const products = gram + row * gram_stride;
    T sum = after.kept[i] * scores[row * before.slots + i];
#pragma unroll 8
    for (int64_t u = 0; u < written; ++u) sum += after.held[u * before.slots + i] * products[u];
    return sum;
  }

  __device__ __forceinline__ void drop(int64_t i) const {
    after.labels[i] = -1;
    after.sample_ids[i] = -1;
    after.usage[i] = T(0);
    after.evaluation[i] = T(0);
  }

  // Writes key t, whose score stands in the record, and returns exp(cos) of it with what the slot holds now, 0 for an
  // empty slot. The record keeps that until `settle` divides it by the sum over all slots.
  __device__ __forceinline__ T write(int64_t t, int64_t i, uint8_t events, int64_t label, int64_t sample_id) const {
    const int64_t at = t * before.slots + i;
    const bool is_least_used = (events & kLeastUsed) != 0;
    const T square = key_square(t);
    const T weight = write_weight(after.evaluation[i], is_least_used, gate);
    T arrived = record.before[at], square_norm = after.square_norms[i];
    if (events != 0) {
      arrived = T(0);
      square_norm = T(0);
      after.kept[i] = T(0);
      for (int64_t u = 0; u < t; ++u) after.held[u * before.slots + i] = T(0);
    }
    if (is_least_used) {
      after.labels[i] = label;
      after.sample_ids[i] = sample_id;
    }
    const T written = score_after(arrived, weight, square);
    square_norm = square_norm_after(square_norm, arrived, written, weight, square, scalar_keys);
    after.held[at] = weight;
    after.square_norms[i] = square_norm;
    record.weights[at] = weight;
    record.square_norms[at] = square_norm;
    record.events[at] = events;
    T share = T(0);
    if (after.labels[i] >= 0) {
      share = exp_of_cosine(on_grid(raw_cosine(written, square_norm, norm_from_square(square))));
    }
    record.evaluation[at] = share;
    return share;
  }

  __device__ __forceinline__ void settle(int64_t t, int64_t i, T sum) const {
    const int64_t at = t * before.slots + i;
    const T evaluation = record.evaluation[at] / sum;
    record.evaluation[at] = evaluation;
    after.evaluation[i] = evaluation;
    after.usage[i] = usage_after(after.usage[i], decay, evaluation, record.weights[at], trust);
  }
};

}  // namespace dan_fast
