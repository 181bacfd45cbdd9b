// The gradient of the loss of scan.h as the body of a cooperative kernel, from what the forward kernel recorded. The
// samples are walked backwards, every thread with its own slots. No PyTorch.
//
// The loss reaches M through the retrieval scores and M' through FP and FN, the pseudo labels being constants. So
// the two memories are independent: a barrier of the grid serves one step of each, and there are as many
// barriers as the longer of the two batches has samples: the sum that the softmax of Eq. (7) puts into its gradient, a
// step, and at the end one before the blocks' shares of the Gram matrix and of the gates are added up.
#pragma once

#include "../../cuda/grid.cuh"
#include "scan.h"
#include "scan_cuda_workspace.h"

namespace dan_fast {

// Two sums over slots: of W^e times its gradient, or of what the slots add to the gradient of the gate.
template <typename T>
struct MemoryPair {
  T labeled, unlabeled;

  static __device__ MemoryPair none() { return {T(0), T(0)}; }
  __device__ void add(const MemoryPair& other) {
    labeled += other.labeled;
    unlabeled += other.unlabeled;
  }
  __device__ MemoryPair from_lane(int step) const {
    return {__shfl_xor_sync(kAllLanes, labeled, step), __shfl_xor_sync(kAllLanes, unlabeled, step)};
  }
};

// Entries of the Gram matrix whose gradients a block adds up at a time.
constexpr int kColumns = 16;

template <typename T>
struct BackwardShared {
  MemoryPair<T> pair[kMaxWarps + 1];
  T columns[kMaxWarps][kColumns];
};

// One memory on the way back. The gradient of score q of a slot stands in `scores` from step q on; when the walk
// passes a step that cleared the slot, the gradients of all later scores are set to 0: nothing before that step
// reached them. What is left at the end is the gradient of the scores that came in.
template <typename T>
struct WritesBack {
  MemoryBefore<T> before;
  WriteRecord<T> record;
  const T* gram;  // row q, column u at q * gram_stride + u
  int64_t gram_stride, steps, rows;  // rows: steps and, for M, the retrievals
  T gate;
  bool scalar_keys;
  T* scores;         // (rows, s) out
  T* gram_share;     // as `gram`: what this block's slots add to its gradient
  T* square_norms;   // (s,) gradient of |m_i|^2 at the current step
  T* evaluations;    // (s,) gradient of W^e at the current step

  __device__ T key_square(int64_t t) const { return gram[t * gram_stride + t]; }
  __device__ bool dropped(int64_t at) const { return (record.events[at] & (kFalsePositive | kFalseNegative)) != 0; }

  // W^e that enters the write of key t.
  __device__ T last_evaluation(int64_t t, int64_t i) const {
    if (dropped(t * before.slots + i)) return T(0);
    if (t > 0) return record.evaluation[(t - 1) * before.slots + i];
    return before.labels[i] >= 0 ? before.evaluation[i] : T(0);
  }

  __device__ T square_norm_before(int64_t t, int64_t i) const {
    return t > 0 ? record.square_norms[(t - 1) * before.slots + i] : before.square_norms[i];
  }

  // From the gradients after the write of key t to those before it. `softmax_sum` is the sum over all slots of W^e
  // times its gradient; `grad_positive` and `grad_negative` are the derivatives of the loss by the sums of exp(cos)
  // over FP and FN. Adds to the gradients of |k_t|^2 and of the gate, and returns W^e before the write times its
  // gradient.
  __device__ __forceinline__ T step(
      int64_t t, int64_t i, T softmax_sum, T grad_positive, T grad_negative, T& grad_key, T& grad_gate) const {
    const int64_t slots = before.slots, at = t * slots + i;
    const uint8_t events = record.events[at];
    const T square = key_square(t), weight = record.weights[at], evaluation = record.evaluation[at];
    const T arrived = events != 0 ? T(0) : record.before[at];

    const T grad_cosine = evaluation * (evaluations[i] - softmax_sum);
    const T written = score_after(arrived, weight, square);
    const CosineGrad<T> after = raw_cosine_backward(grad_cosine, written, record.square_norms[at], square);
    const WriteGrad<T> write =
        write_backward(after.score, square_norms[i] + after.square_norm, arrived, weight, square, scalar_keys);
    grad_key += after.key_square + write.key_square;

    T grad_weight = write.weight;
#pragma unroll 8
    for (int64_t q = t + 1; q < rows; ++q) grad_weight += scores[q * slots + i] * gram[q * gram_stride + t];

    T grad_score = write.before, grad_norm = write.square_norm;
    if (events != 0) {
      grad_score = T(0);
      grad_norm = T(0);
      // V, on the other hand, saw the slot before it was cleared.
      if (dropped(at)) {
        const T score = record.before[at], square_norm = square_norm_before(t, i);
        const T share = exp_of_cosine(on_grid(raw_cosine(score, square_norm, norm_from_square(square))));
        const T grad_share = (events & kFalsePositive) != 0 ? grad_positive : grad_negative;
        const CosineGrad<T> seen = raw_cosine_backward(grad_share * share, score, square_norm, square);
        grad_score = seen.score;
        grad_norm = seen.square_norm;
        grad_key += seen.key_square;
      }
    }
    scores[at] = grad_score;
    square_norms[i] = grad_norm;

    const T last = last_evaluation(t, i);
    grad_gate += grad_weight * write_weight_grad_gate(last, (events & kLeastUsed) != 0);
    const T grad_last = dropped(at) ? T(0) : gate * grad_weight;
    evaluations[i] = grad_last;
    return last * grad_last;
  }
};

template <typename T>
class BackwardScan {
 public:
  __device__ BackwardScan(
      const ScanInput<T>& in,
      const ScanOutput<T>& out,
      const ScanGradient<T>& gradient,
      const ScanWorkspace<T>& workspace,
      BackwardShared<T>& shared)
      : in_(in), out_(out), gradient_(gradient), workspace_(workspace), shared_(shared), threads_(workspace.arrived) {}

  __device__ void run() {
    const int64_t batch = in_.batch, unlabeled_batch = in_.unlabeled_batch, rows = batch + unlabeled_batch;
    if (unlabeled_batch == 0 || *out_.fault != 0 || out_.pseudo_labels[0] < 0) {
      fill_with_zeros();
      return;
    }
    // The loss is a mean.
    grad_loss_ = *gradient_.loss / static_cast<T>(unlabeled_batch);
    T* const gram_share = workspace_.gram + blockIdx.x * rows * rows;
    const int64_t corner = batch * (rows + 1);
    const WritesBack<T> labeled = {
        in_.labeled, out_.labeled_record, in_.gram, rows, batch, rows, sigmoid(in_.gates[0]), in_.scalar_keys,
        gradient_.scores, gram_share, workspace_.labeled_square_norms, workspace_.labeled_evaluations};
    const WritesBack<T> unlabeled = {
        in_.unlabeled, out_.unlabeled_record, in_.gram + corner, rows, unlabeled_batch, unlabeled_batch,
        sigmoid(in_.gates[1]), in_.scalar_keys, gradient_.unlabeled_scores, gram_share + corner,
        workspace_.unlabeled_square_norms, workspace_.unlabeled_evaluations};
    begin(labeled);
    begin(unlabeled);
    retrieve_back(labeled);

    MemoryPair<T> own = MemoryPair<T>::none(), gates = MemoryPair<T>::none();
    const int64_t steps = batch > unlabeled_batch ? batch : unlabeled_batch;
    for (int64_t k = 0; k < steps; ++k) {
      // Nothing depends on the evaluation after the last write.
      const MemoryPair<T> sums = k == 0 ? own : grid_total(own, k % 2 != 0);
      own = MemoryPair<T>::none();
      if (k < batch) own.labeled = step_back(labeled, batch - 1 - k, sums.labeled, T(0), T(0), gates.labeled);
      if (k < unlabeled_batch) {
        const int64_t t = unlabeled_batch - 1 - k;
        const T positive = out_.false_sums[2 * t], negative = out_.false_sums[2 * t + 1];
        const T scale = positive > T(0) ? grad_loss_ * in_.gates[2] : T(0);
        own.unlabeled = step_back(
            unlabeled, t, sums.unlabeled, scale == T(0) ? T(0) : scale * share_loss_grad_p(positive, negative),
            scale == T(0) ? T(0) : scale * share_loss_grad_n(positive, negative), gates.unlabeled);
      }
    }
    add_up(gates, rows);
  }

 private:
  __device__ bool is_first() const { return threads_.first() == 0; }

  __device__ void fill_with_zeros() {
    const int64_t rows = in_.batch + in_.unlabeled_batch;
    fill(gradient_.scores, rows * in_.labeled.slots);
    fill(gradient_.unlabeled_scores, in_.unlabeled_batch * in_.unlabeled.slots);
    fill(gradient_.gram, rows * rows);
    fill(gradient_.gates, 3);
  }
  __device__ void fill(T* values, int64_t size) {
    for (int64_t k = threads_.first(); k < size; k += threads_.stride()) values[k] = T(0);
  }

  __device__ __forceinline__ void begin(const WritesBack<T>& writes) {
    for (int64_t i = threads_.first(); i < writes.before.slots; i += threads_.stride()) {
      writes.square_norms[i] = T(0);
      writes.evaluations[i] = T(0);
    }
  }

  __device__ MemoryPair<T> grid_total(const MemoryPair<T>& own, bool odd) {
    // Not partials[odd]: an index known only at run time would move the arguments from constant to local memory.
    void* const partials = odd ? workspace_.partials[1] : workspace_.partials[0];
    return threads_.grid_total(own, shared_.pair, static_cast<MemoryPair<T>*>(partials));
  }

  // Adds up over the block what its warps have put into the columns; `entry(k)` is where the sum of column k goes.
  template <typename Entry>
  __device__ __forceinline__ void store_columns(int64_t count, const Entry& entry) {
    __syncthreads();
    if (threadIdx.x < count) {
      T sum = T(0);
      for (int warp = 0; warp < threads_.warps(); ++warp) sum += shared_.columns[warp][threadIdx.x];
      entry(threadIdx.x, sum);
    }
    __syncthreads();
  }

  // Eqs. (11), (13) and (16).
  __device__ __forceinline__ void retrieve_back(const WritesBack<T>& writes) {
    const int64_t slots = writes.before.slots;
    for (int64_t b = 0; b < in_.unlabeled_batch; ++b) {
      const int64_t row = in_.batch + b, pseudo_label = out_.pseudo_labels[b];
      const T* const sums = out_.retrieval_sums + 4 * b;
      const T positive = sums[0] / sums[2], negative = sums[3] > T(0) ? sums[1] / sums[3] : T(0);
      const T grad_positive = grad_loss_ * share_loss_grad_p(positive, negative) / sums[2];
      const T grad_negative = sums[3] > T(0) ? grad_loss_ * share_loss_grad_n(positive, negative) / sums[3] : T(0);
      const T square = writes.key_square(row), length = norm_from_square(square);
      T grad_key = T(0);
      for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
        const int64_t label = out_.labeled.labels[i];
        CosineGrad<T> grad = {T(0), T(0), T(0)};
        if (label >= 0) {
          const T score = out_.retrieval_scores[b * slots + i], square_norm = out_.labeled.square_norms[i];
          const T share = exp_of_cosine(on_grid(raw_cosine(score, square_norm, length)));
          grad = raw_cosine_backward(
              (label == pseudo_label ? grad_positive : grad_negative) * share, score, square_norm, square);
        }
        writes.scores[row * slots + i] = grad.score;
        writes.square_norms[i] += grad.square_norm;
        grad_key += grad.key_square;
      }
      grad_key = warp_sum(grad_key);
      const int64_t column = b % kColumns;
      if (threads_.lane() == 0) shared_.columns[threads_.warp()][column] = grad_key;
      if (column == kColumns - 1 || b == in_.unlabeled_batch - 1) {
        const int64_t first = row - column;
        store_columns(column + 1, [&](int64_t k, T sum) {
          writes.gram_share[(first + k) * (writes.gram_stride + 1)] = sum;
        });
      }
    }
  }

  // One step of one memory; returns this thread's share of the sum of W^e before it times its gradient.
  __device__ __forceinline__ T step_back(
      const WritesBack<T>& writes, int64_t t, T softmax_sum, T grad_positive, T grad_negative, T& grad_gate) {
    const int64_t slots = writes.before.slots;
    T grad_key = T(0), product = T(0);
    for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
      product += writes.step(t, i, softmax_sum, grad_positive, grad_negative, grad_key, grad_gate);
    }
    const bool is_unlabeled = writes.rows == writes.steps;
    for (int64_t first = t; first < writes.rows; first += kColumns) {
      T products[kColumns];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) products[k] = T(0);
      if (first == t) products[0] = grad_key;
      for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
        const T weight = writes.record.weights[t * slots + i];
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const int64_t q = first + k;
          if (q > t && q < writes.rows) products[k] += weight * writes.scores[q * slots + i];
        }
      }
      const T sum_of_one = warp_sum_of_each(products);
      if (threads_.lane() < kColumns) shared_.columns[threads_.warp()][threads_.lane()] = sum_of_one;
      const int64_t count = writes.rows - first < kColumns ? writes.rows - first : kColumns;
      store_columns(count, [&](int64_t k, T sum) {
        T& entry = writes.gram_share[(first + k) * writes.gram_stride + t];
        // The diagonal of an unlabelled key already has what its retrieval added.
        entry = is_unlabeled && first + k == t ? entry + sum : sum;
      });
    }
    for (int64_t i = threads_.first(); i < slots; i += threads_.stride()) {
      if (writes.record.events[t * slots + i] == 0) continue;
      for (int64_t q = t + 1; q < writes.rows; ++q) writes.scores[q * slots + i] = T(0);
    }
    return product;
  }

  __device__ __forceinline__ void add_up(const MemoryPair<T>& own, int64_t rows) {
    const MemoryPair<T> in_block = threads_.block_total(own, shared_.pair);
    if (threadIdx.x == 0) {
      workspace_.gates[2 * blockIdx.x] = in_block.labeled;
      workspace_.gates[2 * blockIdx.x + 1] = in_block.unlabeled;
    }
    threads_.sync();
    for (int64_t k = threads_.first(); k < rows * rows; k += threads_.stride()) {
      T sum = T(0);
      if (k % rows <= k / rows) {
        for (unsigned block = 0; block < gridDim.x; ++block) sum += workspace_.gram[block * rows * rows + k];
      }
      gradient_.gram[k] = sum;
    }
    if (blockIdx.x != 0 || threads_.warp() != 0) return;
    T beta = T(0), gate = T(0);
    for (int64_t b = threads_.lane(); b < in_.unlabeled_batch; b += kLanes) {
      const T positive = out_.false_sums[2 * b];
      if (positive > T(0)) beta += share_loss(positive, out_.false_sums[2 * b + 1]);
    }
    beta = warp_sum(beta);
    if (threads_.lane() == 2) gradient_.gates[2] = grad_loss_ * beta;
    if (threads_.lane() >= 2) return;
    for (unsigned block = 0; block < gridDim.x; ++block) gate += workspace_.gates[2 * block + threads_.lane()];
    gradient_.gates[threads_.lane()] = gate * sigmoid_backward(sigmoid(in_.gates[threads_.lane()]));
  }

  const ScanInput<T>& in_;
  const ScanOutput<T>& out_;
  const ScanGradient<T>& gradient_;
  const ScanWorkspace<T>& workspace_;
  BackwardShared<T>& shared_;
  GridThreads threads_;
  T grad_loss_ = T(0);
};

}  // namespace dan_fast
