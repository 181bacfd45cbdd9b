// The CPU scan, forward: labelled writes, retrieval, unlabelled writes, loss.
#include <initializer_list>
#include <limits>

#include "scan.h"
#include "scan_cpu_writes.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

template <typename T>
bool finite(T value) {
  return value - value == T(0);
}

template <typename T>
int32_t faults_of(const ScanInput<T>& in) {
  const int64_t rows = in.batch + in.unlabeled_batch;
  int32_t faults = 0;
  for (int64_t q = 0; q < rows; ++q) {
    if (!finite(in.gram[q * rows + q])) faults |= q < in.batch ? kFaultKeys : kFaultUnlabeledKeys;
  }
  for (int64_t t = 0; t < in.batch; ++t) {
    if (in.labels[t] < 0) faults |= kFaultLabels;
  }
  for (int64_t t = 0; t < in.unlabeled_batch; ++t) {
    if (in.sample_ids[t] < 0) faults |= kFaultSampleIds;
  }
  if (!finite(in.gates[0])) faults |= kFaultAlpha;
  if (!finite(in.gates[1])) faults |= kFaultAlphaUnlabeled;
  if (!finite(in.gates[2])) faults |= kFaultBeta;
  const auto outside = [](const MemoryBefore<T>& memory) {
    return *memory.least_used < 0 || *memory.least_used >= memory.slots;
  };
  if (outside(in.labeled)) faults |= kFaultLeastUsed;
  if (outside(in.unlabeled)) faults |= kFaultLeastUsedUnlabeled;
  return faults;
}

template <typename T>
void leave(
    const MemoryBefore<T>& before, int64_t steps, const MemoryAfter<T>& after, const WriteRecord<T>& record) {
  copy_state(before, after);
  for (T* rows : {after.held, record.before, record.weights, record.evaluation, record.square_norms}) {
    fill(rows, steps * before.slots, T(0));
  }
  fill(record.events, steps * before.slots, uint8_t{0});
}

template <typename T>
void leave_unlabeled(const ScanInput<T>& in, const ScanOutput<T>& out, T loss) {
  leave(in.unlabeled, in.unlabeled_batch, out.unlabeled, out.unlabeled_record);
  fill(out.pseudo_labels, in.unlabeled_batch, int64_t{-1});
  fill(out.retrieval_scores, in.unlabeled_batch * in.labeled.slots, T(0));
  fill(out.retrieval_sums, in.unlabeled_batch * 4, T(0));
  fill(out.false_sums, in.unlabeled_batch * 2, T(0));
  *out.loss = loss;
}

// Pseudo labels, Eq. (11), and the sums over P and N of Eq. (13); returns the sum over B' of Eq. (16). Some slot is
// occupied.
template <typename T>
double retrieve(const ScanInput<T>& in, const ScanOutput<T>& out, const T* occupied, ParallelFor parallel) {
  const int64_t slots = in.labeled.slots, queries = in.unlabeled_batch, keys = in.batch, rows = keys + queries;
  const int64_t chunks = chunks_of(slots);
  const T* gram = in.gram + keys * rows;
  const auto length_of = [&](int64_t b) { return norm_from_square(gram[b * rows + keys + b]); };

  Scratch<T> farthest(chunks * queries);  // the least -cos of a chunk, 2 if it is empty
  Scratch<int64_t> label_there(chunks * queries);
  for_chunks(slots, parallel, [&](const Chunk& chunk) {
    T opposite[kChunk];
    const T* kept = out.labeled.kept + chunk.begin;
    const T* square_norms = out.labeled.square_norms + chunk.begin;
    T* found = out.retrieval_scores + chunk.begin;
    for (int64_t b = 0; b < queries; ++b) {
      const T* scores = in.scores + (keys + b) * slots + chunk.begin;
      for (int64_t i = 0; i < chunk.size; ++i) found[b * slots + i] = kept[i] * scores[i];
    }
    add_products(chunk.size, queries, keys, out.labeled.held + chunk.begin, slots, gram, rows, 1, found, slots);
    for (int64_t b = 0; b < queries; ++b) {
      const T length = length_of(b);
      const T* scores = found + b * slots;
      for (int64_t i = 0; i < chunk.size; ++i) {
        const T cosine = on_grid(raw_cosine(scores[i], square_norms[i], length));
        opposite[i] = occupied[chunk.begin + i] > T(0) ? -cosine : T(2);
      }
      const int64_t at = b * chunks + chunk.index;
      farthest[at] = least(opposite, chunk.size);
      label_there[at] = out.labeled.labels[chunk.begin + place_of(farthest[at], opposite, chunk.size)];
    }
  }, queries);
  for (int64_t b = 0; b < queries; ++b) {
    const T* of_chunks = farthest.get() + b * chunks;
    const int64_t best = place_of(least(of_chunks, chunks), of_chunks, chunks);
    out.pseudo_labels[b] = label_there[b * chunks + best];
  }

  Scratch<double> sums(chunks * queries * 4);
  for_chunks(slots, parallel, [&](const Chunk& chunk) {
    T weights[kChunk], positive[kChunk], negative[kChunk], count[kChunk];
    const int64_t* labels = out.labeled.labels + chunk.begin;
    const double filled = sum(occupied + chunk.begin, chunk.size);
    for (int64_t b = 0; b < queries; ++b) {
      const int64_t label = out.pseudo_labels[b];
      exponentials(
          chunk.size, out.retrieval_scores + b * slots + chunk.begin, out.labeled.square_norms + chunk.begin,
          occupied + chunk.begin, length_of(b), weights);
      for (int64_t i = 0; i < chunk.size; ++i) count[i] = labels[i] == label ? T(1) : T(0);
      for (int64_t i = 0; i < chunk.size; ++i) {
        positive[i] = weights[i] * count[i];
        negative[i] = weights[i] - positive[i];
      }
      double* result = sums.get() + (b * chunks + chunk.index) * 4;
      result[0] = sum(positive, chunk.size);
      result[1] = sum(negative, chunk.size);
      result[2] = sum(count, chunk.size);
      result[3] = filled - result[2];
    }
  }, queries);
  double losses = 0.0;
  for (int64_t b = 0; b < queries; ++b) {
    double total[4] = {0.0, 0.0, 0.0, 0.0};
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t k = 0; k < 4; ++k) total[k] += sums[(b * chunks + c) * 4 + k];
    }
    for (int64_t k = 0; k < 4; ++k) out.retrieval_sums[b * 4 + k] = static_cast<T>(total[k]);
    losses += share_loss(total[0] / total[2], total[3] > 0.0 ? total[1] / total[3] : 0.0);
  }
  return losses;
}

}  // namespace

template <typename T>
void scan_forward(const ScanInput<T>& in, const ScanOutput<T>& out, ParallelFor parallel) {
  *out.fault = faults_of(in);
  if (*out.fault != 0) {
    leave(in.labeled, in.batch, out.labeled, out.labeled_record);
    leave_unlabeled(in, out, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  const int64_t rows = in.batch + in.unlabeled_batch;
  Writes<T> labeled(
      in.labeled, out.labeled, out.labeled_record, in.batch, in.scores, in.gram, rows, sigmoid(in.gates[0]), in.decay,
      T(1), in.scalar_keys, parallel);
  for (int64_t t = 0; t < in.batch; ++t) labeled.write_labeled(t, in.labels[t]);
  if (in.unlabeled_batch == 0 || labeled.occupied_slots() == 0) {
    leave_unlabeled(in, out, T(0));
    return;
  }
  double losses = retrieve(in, out, labeled.occupied(), parallel);

  const T beta = in.gates[2];
  Writes<T> unlabeled(
      in.unlabeled, out.unlabeled, out.unlabeled_record, in.unlabeled_batch, in.unlabeled_scores,
      in.gram + in.batch * rows + in.batch, rows, sigmoid(in.gates[1]), in.decay_unlabeled, beta, in.scalar_keys,
      parallel);
  for (int64_t t = 0; t < in.unlabeled_batch; ++t) {
    const FalseSums sums = unlabeled.drop_false_samples(t, out.pseudo_labels[t]);
    out.false_sums[2 * t] = static_cast<T>(sums.positive);
    out.false_sums[2 * t + 1] = static_cast<T>(sums.negative);
    if (sums.positive > 0.0) losses += static_cast<double>(beta) * share_loss(sums.positive, sums.negative);
    unlabeled.write(t, out.pseudo_labels[t], in.sample_ids[t]);
  }
  *out.loss = static_cast<T>(losses / static_cast<double>(in.unlabeled_batch));
}

template void scan_forward<float>(const ScanInput<float>&, const ScanOutput<float>&, ParallelFor);
template void scan_forward<double>(const ScanInput<double>&, const ScanOutput<double>&, ParallelFor);

}  // namespace dan_fast::DAN_FAST_ISA
