// The scan of scan.h as the body of a cooperative kernel: every thread walks its own slots through all samples of the
// batch, and waits for the others only where a sum, a least-used slot or a set is over all of them. No PyTorch.
//
// Barriers of the grid, each a few hundred nanoseconds to two microseconds and more than the arithmetic between them:
//   labelled sample     2: the sum of exp(cos), which evaluation and hence usage need; the least-used slot, which the
//                       next write needs. Neither follows from the other any sooner.
//   retrieval           2: all scores are there; all pseudo labels are there.
//   unlabelled sample   2 and, if there are false samples, one for each further pass of the selection (1 to 2 as a
//                       rule). The sum of the last write travels with n and the first histogram of the next sample,
//                       whose V needs only that write's weights; the least-used slot with the sums over FP and FN.
//   end of M'           2, as for a labelled sample.
#pragma once

#include "../../cuda/grid.cuh"
#include "../../cuda/top_n.cuh"
#include "scan_cuda_workspace.h"
#include "scan_cuda_writes.cuh"

namespace dan_fast {

struct BatchTotal {
  int32_t fault, occupied;  // bits of Fault; whether M has an occupied slot

  static __device__ BatchTotal none() { return {0, 0}; }
  __device__ void add(const BatchTotal& other) {
    fault |= other.fault;
    occupied |= other.occupied;
  }
  __device__ BatchTotal from_lane(int step) const {
    return {__shfl_xor_sync(kAllLanes, fault, step), __shfl_xor_sync(kAllLanes, occupied, step)};
  }
};

template <typename T>
struct WeightTotal {
  T sum;                    // of exp(cos) after the last write
  uint32_t same, occupied;  // slots with the label of the next sample; all that hold a sample

  static __device__ WeightTotal none() { return {T(0), 0, 0}; }
  __device__ void add(const WeightTotal& other) {
    sum += other.sum;
    same += other.same;
    occupied += other.occupied;
  }
  __device__ WeightTotal from_lane(int step) const {
    return {__shfl_xor_sync(kAllLanes, sum, step), __shfl_xor_sync(kAllLanes, same, step),
            __shfl_xor_sync(kAllLanes, occupied, step)};
  }
};

template <typename T>
struct ChoiceTotal {
  int64_t slot;               // the least-used one, -1 for none
  T usage;                    // of it
  T positive_sum, negative_sum;  // exp(cos) over FP, over FN

  static __device__ ChoiceTotal none() { return {-1, T(0), T(0), T(0)}; }
  __device__ void consider(int64_t other, T its_usage) {
    if (other < 0) return;
    if (slot >= 0 && (is_less(usage, its_usage) || (!is_less(its_usage, usage) && other > slot))) return;
    slot = other;
    usage = its_usage;
  }
  __device__ void add(const ChoiceTotal& other) {
    consider(other.slot, other.usage);
    positive_sum += other.positive_sum;
    negative_sum += other.negative_sum;
  }
  __device__ ChoiceTotal from_lane(int step) const {
    return {__shfl_xor_sync(kAllLanes, slot, step), __shfl_xor_sync(kAllLanes, usage, step),
            __shfl_xor_sync(kAllLanes, positive_sum, step), __shfl_xor_sync(kAllLanes, negative_sum, step)};
  }
};

template <typename T>
struct RetrievalTotal {
  T positive, negative;                      // exp(cos) over P, over N
  uint32_t positive_count, negative_count;

  static __device__ RetrievalTotal none() { return {T(0), T(0), 0, 0}; }
  __device__ void add(const RetrievalTotal& other) {
    positive += other.positive;
    negative += other.negative;
    positive_count += other.positive_count;
    negative_count += other.negative_count;
  }
  __device__ RetrievalTotal from_lane(int step) const {
    return {__shfl_xor_sync(kAllLanes, positive, step), __shfl_xor_sync(kAllLanes, negative, step),
            __shfl_xor_sync(kAllLanes, positive_count, step), __shfl_xor_sync(kAllLanes, negative_count, step)};
  }
};

template <typename T>
struct ForwardShared {
  BatchTotal batch[kMaxWarps + 1];
  WeightTotal<T> weight[kMaxWarps + 1];
  ChoiceTotal<T> choice[kMaxWarps + 1];
  RetrievalTotal<T> retrieval[kMaxWarps + 1];
  TopNShared top;
};

template <typename T>
class ForwardScan {
 public:
  __device__ ForwardScan(
      const ScanInput<T>& in, const ScanOutput<T>& out, const ScanWorkspace<T>& workspace, ForwardShared<T>& shared)
      : in_(in), out_(out), workspace_(workspace), shared_(shared), threads_(workspace.arrived) {}

  __device__ void run() {
    const int64_t rows = in_.batch + in_.unlabeled_batch;
    const Writes<T> labeled = {in_.labeled, out_.labeled, out_.labeled_record, in_.scores, in_.gram, rows, in_.batch,
                               sigmoid(in_.gates[0]), in_.decay, T(1), in_.scalar_keys};
    const Writes<T> unlabeled = {in_.unlabeled, out_.unlabeled, out_.unlabeled_record, in_.unlabeled_scores,
                                 in_.gram + in_.batch * (rows + 1), rows, in_.unlabeled_batch,
                                 sigmoid(in_.gates[1]), in_.decay_unlabeled, in_.gates[2], in_.scalar_keys};
    const BatchTotal batch = look_at_batch();
    if (is_first()) *out_.fault = batch.fault;
    if (batch.fault != 0) {
      leave_as_it_was(labeled);
    } else {
      write_labeled(labeled);
    }
    if (batch.fault != 0 || batch.occupied == 0) {
      leave_as_it_was(unlabeled);
      skip_retrieval();
      if (is_first()) *out_.loss = batch.fault != 0 ? T(NAN) : T(0);
      return;
    }
    if (in_.unlabeled_batch > 0) retrieve(labeled);
    write_unlabeled(unlabeled);
    if (blockIdx.x == 0 && threads_.warp() == 0) add_up_loss();
  }

 private:
  __device__ bool is_first() const { return threads_.first() == 0; }

  // Every block looks at the whole batch: less than a barrier costs.
  __device__ BatchTotal look_at_batch() {
    const int64_t rows = in_.batch + in_.unlabeled_batch;
    BatchTotal total = {0, in_.batch > 0 ? 1 : 0};
    for (int64_t q = threadIdx.x; q < rows; q += blockDim.x) {
      const bool has_label = q < in_.batch;
      if (!std::isfinite(in_.gram[q * rows + q])) total.fault |= has_label ? kFaultKeys : kFaultUnlabeledKeys;
      if (has_label && in_.labels[q] < 0) total.fault |= kFaultLabels;
      if (!has_label && in_.sample_ids[q - in_.batch] < 0) total.fault |= kFaultSampleIds;
    }
    if (threadIdx.x == 0) {
      const int64_t least_used = *in_.labeled.least_used, least_used_unlabeled = *in_.unlabeled.least_used;
      if (!std::isfinite(in_.gates[0])) total.fault |= kFaultAlpha;
      if (!std::isfinite(in_.gates[1])) total.fault |= kFaultAlphaUnlabeled;
      if (!std::isfinite(in_.gates[2])) total.fault |= kFaultBeta;
      if (least_used < 0 || least_used >= in_.labeled.slots) total.fault |= kFaultLeastUsed;
      if (least_used_unlabeled < 0 || least_used_unlabeled >= in_.unlabeled.slots) {
        total.fault |= kFaultLeastUsedUnlabeled;
      }
    }
    for (int64_t i = threadIdx.x; in_.batch == 0 && i < in_.labeled.slots; i += blockDim.x) {
      if (in_.labeled.labels[i] >= 0) total.occupied = 1;
    }
    return threads_.block_total(total, shared_.batch);
  }

  __device__ __forceinline__ void leave_as_it_was(const Writes<T>& writes) {
    for (int64_t i = threads_.first(); i < writes.before.slots; i += threads_.stride()) writes.leave_as_it_was(i);
    if (is_first()) *writes.after.least_used = *writes.before.least_used;
  }

  __device__ void skip_retrieval() {
    const int64_t size = in_.unlabeled_batch * in_.labeled.slots;
    for (int64_t k = threads_.first(); k < size; k += threads_.stride()) out_.retrieval_scores[k] = T(0);
    for (int64_t b = threads_.first(); b < in_.unlabeled_batch; b += threads_.stride()) {
      out_.pseudo_labels[b] = -1;
      for (int k = 0; k < 4; ++k) out_.retrieval_sums[4 * b + k] = T(0);
      for (int k = 0; k < 2; ++k) out_.false_sums[2 * b + k] = T(0);
    }
  }

  // The totals of the two kinds take turns, and so do the places for them.
  __device__ WeightTotal<T> grid_total(const WeightTotal<T>& own) {
    return threads_.grid_total(own, shared_.weight, static_cast<WeightTotal<T>*>(workspace_.partials[0]));
  }
  __device__ ChoiceTotal<T> grid_total(const ChoiceTotal<T>& own) {
    return threads_.grid_total(own, shared_.choice, static_cast<ChoiceTotal<T>*>(workspace_.partials[1]));
  }

  // Evaluation and usage after key t, and which slot is used least.
  __device__ __forceinline__ int64_t settle(const Writes<T>& writes, int64_t t, const WeightTotal<T>& own) {
    const T sum = grid_total(own).sum;
    ChoiceTotal<T> choice = ChoiceTotal<T>::none();
    for (int64_t i = threads_.first(); i < writes.before.slots; i += threads_.stride()) {
      writes.settle(t, i, sum);
      choice.consider(i, writes.after.usage[i]);
    }
    return grid_total(choice).slot;
  }

  __device__ __forceinline__ void write_labeled(const Writes<T>& writes) {
    int64_t least_used = *writes.before.least_used;
    const int64_t slots = writes.before.slots;
    for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) writes.begin(i);
    for (int64_t t = 0; t < writes.steps; ++t) {
      WeightTotal<T> total = WeightTotal<T>::none();
      for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
        writes.record.before[t * slots + i] = writes.score(t, t, i);
        total.sum += writes.write(t, i, i == least_used ? kLeastUsed : 0, in_.labels[t], -1);
      }
      least_used = settle(writes, t, total);
    }
    if (is_first()) *writes.after.least_used = least_used;
  }

  // Eqs. (11), (13) and (16): thread by thread for the scores, which are products with what a thread's own slots
  // hold, and block by block for the rest, so that all samples together need no more barriers than one.
  __device__ __forceinline__ void retrieve(const Writes<T>& writes) {
    const int64_t slots = writes.before.slots;
    for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
      for (int64_t b = 0; b < in_.unlabeled_batch; ++b) {
        out_.retrieval_scores[b * slots + i] = writes.score(in_.batch + b, in_.batch, i);
      }
    }
    threads_.sync();
    for (int64_t b = blockIdx.x; b < in_.unlabeled_batch; b += gridDim.x) {
      const T length = norm_from_square(writes.key_square(in_.batch + b));
      const auto cosine = [&](int64_t i) {
        return on_grid(raw_cosine(out_.retrieval_scores[b * slots + i], writes.after.square_norms[i], length));
      };
      // The nearest slot is the one of least -cos.
      ChoiceTotal<T> nearest = ChoiceTotal<T>::none();
      for (int64_t i = threadIdx.x; i < slots; i += blockDim.x) {
        if (writes.after.labels[i] >= 0) nearest.consider(i, -cosine(i));
      }
      const int64_t pseudo_label = writes.after.labels[threads_.block_total(nearest, shared_.choice).slot];
      RetrievalTotal<T> total = RetrievalTotal<T>::none();
      for (int64_t i = threadIdx.x; i < slots; i += blockDim.x) {
        if (writes.after.labels[i] < 0) continue;
        const T share = exp_of_cosine(cosine(i));
        if (writes.after.labels[i] == pseudo_label) {
          total.positive += share;
          ++total.positive_count;
        } else {
          total.negative += share;
          ++total.negative_count;
        }
      }
      total = threads_.block_total(total, shared_.retrieval);
      if (threadIdx.x == 0) {
        out_.pseudo_labels[b] = pseudo_label;
        out_.retrieval_sums[4 * b] = total.positive;
        out_.retrieval_sums[4 * b + 1] = total.negative;
        out_.retrieval_sums[4 * b + 2] = static_cast<T>(total.positive_count);
        out_.retrieval_sums[4 * b + 3] = static_cast<T>(total.negative_count);
      }
    }
    threads_.sync();
  }

  // Eqs. (12) to (15).
  __device__ __forceinline__ void write_unlabeled(const Writes<T>& writes) {
    using Key = typename Grid<T>::Key;
    const int64_t slots = writes.before.slots;
    T* const cosines = workspace_.unlabeled_cosines;
    TopN<Key, Grid<T>::kKeyBits> top(shared_.top, workspace_.histograms, slots);
    for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) writes.begin(i);

    WeightTotal<T> written = WeightTotal<T>::none();
    for (int64_t t = 0; t < writes.steps; ++t) {
      const int64_t pseudo_label = out_.pseudo_labels[t];
      const T length = norm_from_square(writes.key_square(t));
      top.start();
      for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
        const T score = writes.score(t, t, i);
        writes.record.before[t * slots + i] = score;
        if (writes.after.labels[i] < 0) continue;
        cosines[i] = on_grid(raw_cosine(score, writes.after.square_norms[i], length));
        top.add(order_key(cosines[i]), i);
        ++written.occupied;
        if (writes.after.labels[i] == pseudo_label) ++written.same;
      }
      top.publish();
      written = grid_total(written);

      // Otherwise T is nothing or everything, and nothing is false.
      const bool has_false = written.same > 0 && written.same < written.occupied;
      if (has_false) {
        for (bool done = top.narrow(written.same); !done; done = top.narrow()) {
          for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
            if (writes.after.labels[i] >= 0) top.add(order_key(cosines[i]), i);
          }
          top.publish();
          threads_.sync();
        }
      }
      ChoiceTotal<T> choice = ChoiceTotal<T>::none();
      for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
        if (t > 0) writes.settle(t - 1, i, written.sum);
        uint8_t events = 0;
        const int64_t label = writes.after.labels[i];
        if (has_false && label >= 0 && (label == pseudo_label) != top.contains(order_key(cosines[i]), i)) {
          events = label == pseudo_label ? kFalsePositive : kFalseNegative;
          (events == kFalsePositive ? choice.positive_sum : choice.negative_sum) += exp_of_cosine(cosines[i]);
          writes.drop(i);
        }
        writes.record.events[t * slots + i] = events;
        choice.consider(i, writes.after.usage[i]);
      }
      choice = grid_total(choice);
      if (is_first()) {
        out_.false_sums[2 * t] = choice.positive_sum;
        out_.false_sums[2 * t + 1] = choice.negative_sum;
      }

      written = WeightTotal<T>::none();
      for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
        const uint8_t events = writes.record.events[t * slots + i] | (i == choice.slot ? kLeastUsed : 0);
        written.sum += writes.write(t, i, events, pseudo_label, in_.sample_ids[t]);
      }
    }
    int64_t least_used = *writes.before.least_used;
    if (writes.steps > 0) least_used = settle(writes, writes.steps - 1, written);
    if (is_first()) *writes.after.least_used = least_used;
  }

  __device__ void add_up_loss() {
    __syncwarp();
    T loss = T(0);
    for (int64_t b = threads_.lane(); b < in_.unlabeled_batch; b += kLanes) {
      const T* const sums = out_.retrieval_sums + 4 * b;
      const T* const false_sums = out_.false_sums + 2 * b;
      loss += share_loss(sums[0] / sums[2], sums[3] > T(0) ? sums[1] / sums[3] : T(0));
      if (false_sums[0] > T(0)) loss += in_.gates[2] * share_loss(false_sums[0], false_sums[1]);
    }
    loss = warp_sum(loss);
    if (threads_.lane() == 0) *out_.loss = in_.unlabeled_batch > 0 ? loss / static_cast<T>(in_.unlabeled_batch) : T(0);
  }

  const ScanInput<T>& in_;
  const ScanOutput<T>& out_;
  const ScanWorkspace<T>& workspace_;
  ForwardShared<T>& shared_;
  GridThreads threads_;
};

}  // namespace dan_fast
