// The CPU scan, backward: the gradient of the loss in scores, Gram matrix and gates.
#include "scan_cpu.h"
#include "scan_cpu_reverse.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

template <typename T>
void retrieval_backward(
    int64_t size, const T* __restrict exponentials, const int64_t* __restrict labels, int64_t label, T by_positive,
    T by_negative, const T* __restrict scores, const T* __restrict square_norms, T key_square,
    T* __restrict score_grad, T* __restrict square_norm_grad, T* __restrict key_grad) {
  for (int64_t i = 0; i < size; ++i) {
    const T by_exponential = labels[i] == label ? by_positive : by_negative;
    const CosineGrad<T> grad =
        raw_cosine_backward(exponentials[i] * by_exponential, scores[i], square_norms[i], key_square);
    score_grad[i] = grad.score;
    square_norm_grad[i] += grad.square_norm;
    key_grad[i] = grad.key_square;
  }
}

// Of Eqs. (13) and (16): the rows of `scores` of unlabelled keys, what it adds to gram_grad, and the gradients of
// square norms (s1,) and held shares (B, s1) of M after its writes.
template <typename T>
void retrieve_backward(
    const ScanInput<T>& in, const ScanOutput<T>& out, const ScanGradient<T>& grad, double loss_grad,
    T* square_norm_grad, T* held_grad, double* gram_grad, ParallelFor parallel) {
  const int64_t slots = in.labeled.slots, queries = in.unlabeled_batch, keys = in.batch, rows = keys + queries;
  const int64_t chunks = chunks_of(slots), width = keys + 1;
  const T* gram = in.gram + keys * rows;
  Scratch<T> by_positive(queries), by_negative(queries);
  for (int64_t b = 0; b < queries; ++b) {
    const T* sums = out.retrieval_sums + b * 4;
    const double positives = sums[2], negatives = sums[3];
    const double p = sums[0] / positives, n = negatives > 0.0 ? sums[1] / negatives : 0.0;
    by_positive[b] = static_cast<T>(loss_grad * share_loss_by_p(p, n) / positives);
    by_negative[b] = negatives > 0.0 ? static_cast<T>(loss_grad * share_loss_by_n(p, n) / negatives) : T(0);
  }

  Scratch<double> sums(chunks * queries * width);  // of the row of a query: of the keys of M, then of its own square
  for_chunks(slots, parallel, [&](const Chunk& chunk) {
    T weights[kChunk], occupied[kChunk], key_grad[kChunk];
    const int64_t* labels = out.labeled.labels + chunk.begin;
    const T* square_norms = out.labeled.square_norms + chunk.begin;
    for (int64_t i = 0; i < chunk.size; ++i) occupied[i] = labels[i] >= 0 ? T(1) : T(0);
    fill(square_norm_grad + chunk.begin, chunk.size, T(0));
    for (int64_t u = 0; u < keys; ++u) fill(held_grad + u * slots + chunk.begin, chunk.size, T(0));
    double* result = sums.get() + chunk.index * queries * width;
    T* score_grad = grad.scores + keys * slots + chunk.begin;
    for (int64_t b = 0; b < queries; ++b) {
      const T key_square = gram[b * rows + keys + b];
      const T* scores = out.retrieval_scores + b * slots + chunk.begin;
      exponentials(chunk.size, scores, square_norms, occupied, norm_from_square(key_square), weights);
      retrieval_backward(
          chunk.size, weights, labels, out.pseudo_labels[b], by_positive[b], by_negative[b], scores, square_norms,
          key_square, score_grad + b * slots, square_norm_grad + chunk.begin, key_grad);
      result[b * width + keys] = sum(key_grad, chunk.size);
    }
    const T* held = out.labeled.held + chunk.begin;
    add_products(chunk.size, keys, queries, score_grad, slots, gram, 1, rows, held_grad + chunk.begin, slots);
    inner_products(chunk.size, queries, score_grad, slots, keys, held, slots, result, width, 1);
    const T* kept = out.labeled.kept + chunk.begin;
    for (int64_t b = 0; b < queries; ++b) {
      for (int64_t i = 0; i < chunk.size; ++i) score_grad[b * slots + i] *= kept[i];
    }
  });
  for (int64_t c = 0; c < chunks; ++c) {
    const double* of_chunk = sums.get() + c * queries * width;
    for (int64_t b = 0; b < queries; ++b) {
      double* of_query = gram_grad + (keys + b) * rows;
      for (int64_t u = 0; u < keys; ++u) of_query[u] += of_chunk[b * width + u];
      of_query[keys + b] += of_chunk[b * width + keys];
    }
  }
}

}  // namespace

template <typename T>
void scan_backward(
    const ScanInput<T>& in, const ScanOutput<T>& out, const ScanGradient<T>& grad, ParallelFor parallel) {
  const int64_t keys = in.batch, queries = in.unlabeled_batch, rows = keys + queries, slots = in.labeled.slots;
  if (queries == 0 || *out.fault != 0 || out.pseudo_labels[0] < 0) {
    fill(grad.scores, rows * slots, T(0));
    fill(grad.unlabeled_scores, queries * in.unlabeled.slots, T(0));
    fill(grad.gram, rows * rows, T(0));
    fill(grad.gates, 3, T(0));
    return;
  }
  const double loss_grad = static_cast<double>(*grad.loss) / static_cast<double>(queries);
  const double beta = in.gates[2];
  Scratch<double> gram_grad(rows * rows);
  fill(gram_grad.get(), rows * rows, 0.0);

  Scratch<T> unlabeled_norm_grad(in.unlabeled.slots);
  fill(unlabeled_norm_grad.get(), in.unlabeled.slots, T(0));
  const int64_t own = keys * rows + keys;  // where the unlabelled keys' block of the Gram matrix begins
  const T unlabeled_gate = sigmoid(in.gates[1]);
  Reverse<T> unlabeled(
      in.unlabeled, out.unlabeled_record, queries, in.gram + own, rows, unlabeled_gate, in.scalar_keys,
      grad.unlabeled_scores, unlabeled_norm_grad.get(), nullptr, gram_grad.get() + own, parallel);
  double false_losses = 0.0;
  for (int64_t t = queries - 1; t >= 0; --t) {
    const double positive = out.false_sums[2 * t], negative = out.false_sums[2 * t + 1];
    const bool present = positive > 0.0;
    if (present) false_losses += share_loss(positive, negative);
    unlabeled.step_back(
        t, present ? loss_grad * beta * share_loss_by_p(positive, negative) : 0.0,
        present ? loss_grad * beta * share_loss_by_n(positive, negative) : 0.0);
  }

  Scratch<T> norm_grad(slots), held_grad(keys * slots);
  retrieve_backward(in, out, grad, loss_grad, norm_grad.get(), held_grad.get(), gram_grad.get(), parallel);
  const T gate = sigmoid(in.gates[0]);
  Reverse<T> labeled(
      in.labeled, out.labeled_record, keys, in.gram, rows, gate, in.scalar_keys, grad.scores, norm_grad.get(),
      held_grad.get(), gram_grad.get(), parallel);
  for (int64_t t = keys - 1; t >= 0; --t) labeled.step_back(t, 0.0, 0.0);

  for (int64_t k = 0; k < rows * rows; ++k) grad.gram[k] = static_cast<T>(gram_grad[k]);
  grad.gates[0] = static_cast<T>(labeled.gate_grad()) * sigmoid_backward(gate);
  grad.gates[1] = static_cast<T>(unlabeled.gate_grad()) * sigmoid_backward(unlabeled_gate);
  grad.gates[2] = static_cast<T>(loss_grad * false_losses);
}

template void scan_backward<float>(
    const ScanInput<float>&, const ScanOutput<float>&, const ScanGradient<float>&, ParallelFor);
template void scan_backward<double>(
    const ScanInput<double>&, const ScanOutput<double>&, const ScanGradient<double>&, ParallelFor);

}  // namespace dan_fast::DAN_FAST_ISA
