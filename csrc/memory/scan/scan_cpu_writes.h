// One memory while the keys of a batch are written to it, Eqs. (5)-(10), (12) and (14). For `*_isa.cpp` files.
#pragma once

#include "../cpu_loops.h"
#include "../select.h"
#include "scan.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// exp(cos) where occupied, else 0.
template <typename T>
void exponentials(
    int64_t size, const T* __restrict scores, const T* __restrict square_norms, const T* __restrict occupied,
    T length, T* __restrict result) {
  for (int64_t i = 0; i < size; ++i) {
    const T exponential = exp_of_cosine(on_grid(raw_cosine(scores[i], square_norms[i], length)));
    result[i] = occupied[i] > T(0) ? exponential : T(0);
  }
}

// order_key of the cosines, -1 for empty slots.
template <typename T, typename Key>
void order_keys(
    int64_t size, const T* __restrict scores, const T* __restrict square_norms, const T* __restrict occupied,
    T length, Key* __restrict keys) {
  for (int64_t i = 0; i < size; ++i) {
    const Key key = order_key(on_grid(raw_cosine(scores[i], square_norms[i], length)));
    keys[i] = occupied[i] > T(0) ? (key > 0 ? key : Key(0)) : Key(-1);  // of NaN 0 as well
  }
}

template <typename T>
void shares(int64_t size, const T* __restrict evaluation, T gate, T* __restrict weights) {
  for (int64_t i = 0; i < size; ++i) weights[i] = write_weight(evaluation[i], false, gate);
}

template <typename T>
void add_key(
    int64_t size, const T* __restrict before, const T* __restrict weights, T key_square, bool scalar_keys,
    T* __restrict square_norms, T* __restrict after) {
  for (int64_t i = 0; i < size; ++i) {
    after[i] = score_after(before[i], weights[i], key_square);
    square_norms[i] = square_norm_after(square_norms[i], before[i], after[i], weights[i], key_square, scalar_keys);
  }
}

template <typename T>
void evaluate(
    int64_t size, const T* __restrict exponentials, const T* __restrict weights, T scale, T decay, T trust,
    T* __restrict evaluation, T* __restrict usage) {
  for (int64_t i = 0; i < size; ++i) {
    evaluation[i] = exponentials[i] * scale;
    usage[i] = usage_after(usage[i], decay, evaluation[i], weights[i], trust);
  }
}

// The memory as it comes in, but for what it holds of the batch's keys.
template <typename T>
void copy_state(const MemoryBefore<T>& before, const MemoryAfter<T>& after) {
  copy(before.square_norms, before.slots, after.square_norms);
  copy(before.usage, before.slots, after.usage);
  copy(before.evaluation, before.slots, after.evaluation);
  copy(before.labels, before.slots, after.labels);
  copy(before.sample_ids, before.slots, after.sample_ids);
  *after.least_used = *before.least_used;
  fill(after.kept, before.slots, T(1));
}

struct FalseSums {
  double positive, negative;
};

template <typename T>
class Writes {
 public:
  // `scores` (steps, s) and `gram` (steps, steps; its rows gram_stride apart) of the keys to be written.
  Writes(
      const MemoryBefore<T>& before, const MemoryAfter<T>& after, const WriteRecord<T>& record, int64_t steps,
      const T* scores, const T* gram, int64_t gram_stride, T gate, T decay, T trust, bool scalar_keys,
      ParallelFor parallel)
      : slots_(before.slots), chunks_(chunks_of(slots_)), steps_(steps), after_(after), record_(record),
        scores_(scores), gram_(gram), gram_stride_(gram_stride), gate_(gate), decay_(decay), trust_(trust),
        scalar_keys_(scalar_keys), parallel_(parallel), occupied_(slots_), evaluation_(slots_),
        exponentials_(slots_), keys_(slots_), places_(slots_), sums_(2 * chunks_), least_usage_(chunks_),
        has_events_(chunks_) {
    copy_state(before, after);
    for (int64_t i = 0; i < slots_; ++i) {
      const bool occupied = before.labels[i] >= 0;
      occupied_[i] = occupied ? T(1) : T(0);
      evaluation_[i] = occupied ? before.evaluation[i] : T(0);
      occupied_slots_ += occupied;
    }
    for_chunks(slots_, parallel_, [&](const Chunk& chunk) { find_least_usage(chunk); });
  }

  const T* occupied() const { return occupied_.get(); }
  int64_t occupied_slots() const { return occupied_slots_; }

  // FP and FN of Eq. (14) for the next key: clears them and names the least-used slot anew. Adds up V over both.
  FalseSums drop_false_samples(int64_t step, int64_t label) {
    begin(step);
    int64_t same = 0;
    for (int64_t i = 0; i < slots_; ++i) same += after_.labels[i] == label;
    FalseSums total = {0.0, 0.0};
    // Otherwise T is empty, or all of the occupied slots: there is no set.
    if (same > 0 && same < occupied_slots_) {
      const T length = norm_from_square(key_square(step));
      for_chunks(slots_, parallel_, [&](const Chunk& chunk) {
        find_scores(step, chunk);
        order_keys(
            chunk.size, row(record_.before, step, chunk), after_.square_norms + chunk.begin,
            occupied_.get() + chunk.begin, length, keys_.get() + chunk.begin);
      });
      scores_found_ = true;
      const auto cut = cut_of_largest(keys_.get(), slots_, same, Grid<T>::kKeyBits, places_.get());
      for_chunks(slots_, parallel_, [&](const Chunk& chunk) { drop(step, chunk, label, cut); });
      for (int64_t c = 0; c < chunks_; ++c) {
        total.positive += sums_[2 * c];
        total.negative += sums_[2 * c + 1];
      }
      occupied_slots_ = 0;
      for (int64_t i = 0; i < slots_; ++i) occupied_slots_ += occupied_[i] > T(0);
    }
    *after_.least_used = find_least_used();
    return total;
  }

  // The next key of M; of M', `drop_false_samples` comes first.
  void write_labeled(int64_t step, int64_t label) {
    begin(step);
    write(step, label, -1);
  }

  void write(int64_t step, int64_t label, int64_t sample_id) {
    const int64_t slot = *after_.least_used;
    record_.events[step * slots_ + slot] |= kLeastUsed;
    has_events_[slot / kChunk] = 1;
    after_.labels[slot] = label;
    after_.sample_ids[slot] = sample_id;
    occupied_slots_ += occupied_[slot] == T(0);
    occupied_[slot] = T(1);
    for_chunks(slots_, parallel_, [&](const Chunk& chunk) { write(step, chunk); });
    double total = 0.0;
    for (int64_t c = 0; c < chunks_; ++c) total += sums_[c];
    const T scale = static_cast<T>(1.0 / total);
    for_chunks(slots_, parallel_, [&](const Chunk& chunk) {
      evaluate(
          chunk.size, exponentials_.get() + chunk.begin, row(record_.weights, step, chunk), scale, decay_, trust_,
          row(record_.evaluation, step, chunk), after_.usage + chunk.begin);
      find_least_usage(chunk);
      if (step + 1 == steps_) {
        copy(row(record_.evaluation, step, chunk), chunk.size, after_.evaluation + chunk.begin);
      }
    });
    *after_.least_used = find_least_used();
  }

 private:
  using Key = typename Grid<T>::Key;
  static constexpr int64_t kAhead = 8;

  template <typename Element>
  Element* row(Element* rows, int64_t step, const Chunk& chunk) const {
    return rows + step * slots_ + chunk.begin;
  }

  T key_square(int64_t step) const { return gram_[step * gram_stride_ + step]; }

  void begin(int64_t step) {
    scores_found_ = false;
    fill(record_.events + step * slots_, slots_, uint8_t{0});
    fill(has_events_.get(), chunks_, uint8_t{0});
  }

  // Every kAhead steps what the slots hold is read once for the next kAhead keys; between, only what came since.
  void find_scores(int64_t step, const Chunk& chunk) {
    const int64_t since = step - step % kAhead;
    const T* gram = gram_ + step * gram_stride_;
    T* before = row(record_.before, step, chunk);
    if (step == since) {
      const int64_t keys = steps_ - step < kAhead ? steps_ - step : kAhead;
      const T* scores = row(scores_, step, chunk);
      const T* kept = after_.kept + chunk.begin;
      for (int64_t t = 0; t < keys; ++t) {
        for (int64_t i = 0; i < chunk.size; ++i) before[t * slots_ + i] = kept[i] * scores[t * slots_ + i];
      }
      add_products(
          chunk.size, keys, step, after_.held + chunk.begin, slots_, gram, gram_stride_, 1, before, slots_);
    } else {
      const T* held = row(after_.held, since, chunk);
      add_products(chunk.size, 1, step - since, held, slots_, gram + since, 0, 1, before, slots_);
    }
  }

  void drop(int64_t step, const Chunk& chunk, int64_t label, const Cut<Key>& cut) {
    T exponential[kChunk], positive[kChunk], negative[kChunk];
    const T length = norm_from_square(key_square(step));
    exponentials(
        chunk.size, row(record_.before, step, chunk), after_.square_norms + chunk.begin,
        occupied_.get() + chunk.begin, length, exponential);
    uint8_t* events = row(record_.events, step, chunk);
    const Key* keys = keys_.get() + chunk.begin;
    const int64_t* labels = after_.labels + chunk.begin;
    bool any = false;
    for (int64_t i = 0; i < chunk.size; ++i) {
      const bool same = labels[i] == label, chosen = cut.chooses(keys[i], chunk.begin + i);
      const bool false_positive = same & !chosen, false_negative = !same & chosen & (keys[i] >= 0);
      positive[i] = false_positive ? exponential[i] : T(0);
      negative[i] = false_negative ? exponential[i] : T(0);
      events[i] = static_cast<uint8_t>((false_positive ? kFalsePositive : 0) | (false_negative ? kFalseNegative : 0));
      any |= false_positive | false_negative;
    }
    sums_[2 * chunk.index] = sums_[2 * chunk.index + 1] = 0.0;
    if (!any) return;
    sums_[2 * chunk.index] = sum(positive, chunk.size);
    sums_[2 * chunk.index + 1] = sum(negative, chunk.size);
    has_events_[chunk.index] = 1;
    for (int64_t i = 0; i < chunk.size; ++i) {
      if (events[i] == 0) continue;
      const int64_t slot = chunk.begin + i;
      after_.labels[slot] = after_.sample_ids[slot] = -1;
      after_.usage[slot] = occupied_[slot] = T(0);
    }
    find_least_usage(chunk);
  }

  void write(int64_t step, const Chunk& chunk) {
    T before[kChunk], after[kChunk];
    if (!scores_found_) find_scores(step, chunk);
    copy(row(record_.before, step, chunk), chunk.size, before);
    const T* evaluation = step == 0 ? evaluation_.get() + chunk.begin : row(record_.evaluation, step - 1, chunk);
    T* weights = row(record_.weights, step, chunk);
    shares(chunk.size, evaluation, gate_, weights);
    if (has_events_[chunk.index]) clear(step, chunk, evaluation, before, weights);
    copy(weights, chunk.size, row(after_.held, step, chunk));
    T* square_norms = after_.square_norms + chunk.begin;
    add_key(chunk.size, before, weights, key_square(step), scalar_keys_, square_norms, after);
    copy(square_norms, chunk.size, row(record_.square_norms, step, chunk));
    T* exponential = exponentials_.get() + chunk.begin;
    const T length = norm_from_square(key_square(step));
    exponentials(chunk.size, after, square_norms, occupied_.get() + chunk.begin, length, exponential);
    sums_[chunk.index] = sum(exponential, chunk.size);
  }

  void clear(int64_t step, const Chunk& chunk, const T* evaluation, T* before, T* weights) {
    const uint8_t* events = row(record_.events, step, chunk);
    int64_t cleared[kChunk], count = 0;
    for (int64_t i = 0; i < chunk.size; ++i) {
      if (events[i] == 0) continue;
      cleared[count++] = chunk.begin + i;
      // A false sample is forgotten, its share of the next write included; the least-used slot keeps its share.
      const bool dropped = (events[i] & (kFalsePositive | kFalseNegative)) != 0;
      weights[i] = write_weight(dropped ? T(0) : evaluation[i], (events[i] & kLeastUsed) != 0, gate_);
      before[i] = T(0);
      after_.square_norms[chunk.begin + i] = T(0);
      after_.kept[chunk.begin + i] = T(0);
    }
    for (int64_t u = 0; u < step; ++u) {
      for (int64_t k = 0; k < count; ++k) after_.held[u * slots_ + cleared[k]] = T(0);
    }
    for (int64_t t = step + 1; t < steps_ && t % kAhead != 0; ++t) {
      for (int64_t k = 0; k < count; ++k) record_.before[t * slots_ + cleared[k]] = T(0);
    }
  }

  void find_least_usage(const Chunk& chunk) {
    least_usage_[chunk.index] = least(after_.usage + chunk.begin, chunk.size);
  }

  // Eq. (6), the lowest slot on ties.
  int64_t find_least_used() const {
    const int64_t index = place_of(least(least_usage_.get(), chunks_), least_usage_.get(), chunks_);
    const int64_t begin = index * kChunk, left = slots_ - begin;
    const T* usage = after_.usage + begin;
    return begin + place_of(least_usage_[index], usage, left < kChunk ? left : kChunk);
  }

  const int64_t slots_, chunks_, steps_;
  const MemoryAfter<T> after_;
  const WriteRecord<T> record_;
  const T* const scores_;
  const T* const gram_;
  const int64_t gram_stride_;
  const T gate_, decay_, trust_;
  const bool scalar_keys_;
  const ParallelFor parallel_;
  int64_t occupied_slots_ = 0;
  bool scores_found_ = false;
  Scratch<T> occupied_;    // 1, or 0 where empty
  Scratch<T> evaluation_;  // of the incoming state, 0 where empty
  Scratch<T> exponentials_;
  Scratch<Key> keys_;
  Scratch<int64_t> places_;
  Scratch<double> sums_;         // per chunk, or two per chunk
  Scratch<T> least_usage_;       // per chunk
  Scratch<uint8_t> has_events_;  // per chunk
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
