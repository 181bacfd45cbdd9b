// The CPU scan, backward: the gradient of the loss in scores, Gram matrix and gates.
#include "scan.h"
#include "scan_cpu_reverse.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

template <typename T>
void retrieval_backward(
    int64_t size, const T* __restrict exponentials, const int64_t* __restrict labels, int64_t label, T grad_positive,
    T grad_negative, const T* __restrict scores, const T* __restrict square_norms, T key_square,
    T* __restrict grad_score, T* __restrict grad_square_norm, T* __restrict grad_key) {
  for (int64_t i = 0; i < size; ++i) {
    const T grad_exponential = labels[i] == label ? grad_positive : grad_negative;
    const CosineGrad<T> grad =
        raw_cosine_backward(exponentials[i] * grad_exponential, scores[i], square_norms[i], key_square);
    grad_score[i] = grad.score;
    grad_square_norm[i] += grad.square_norm;
    grad_key[i] = grad.key_square;
  }
}

// Of Eqs. (13) and (16): the rows of `scores` of unlabelled keys, what it adds to grad_gram, and the gradients of
// square norms (s1,) and held shares (B, s1) of M after its writes.
template <typename T>
void retrieve_backward(
    const ScanInput<T>& in, const ScanOutput<T>& out, const ScanGradient<T>& grad, double grad_loss,
    T* grad_square_norm, T* grad_held, double* grad_gram, ParallelFor parallel) {
  const int64_t slots = in.labeled.slots, queries = in.unlabeled_batch, keys = in.batch, rows = keys + queries;
  const int64_t chunks = chunks_of(slots), width = keys + 1;
  const T* gram = in.gram + keys * rows;
  Scratch<T> grad_positive(queries), grad_negative(queries);
  for (int64_t b = 0; b < queries; ++b) {
    const T* sums = out.retrieval_sums + b * 4;
    const double positives = sums[2], negatives = sums[3];
    const double p = sums[0] / positives, n = negatives > 0.0 ? sums[1] / negatives : 0.0;
    grad_positive[b] = static_cast<T>(grad_loss * share_loss_grad_p(p, n) / positives);
    grad_negative[b] = negatives > 0.0 ? static_cast<T>(grad_loss * share_loss_grad_n(p, n) / negatives) : T(0);
  }

  Scratch<double> sums(chunks * queries * width);  // of the row of a query: of the keys of M, then of its own square
  for_chunks(slots, parallel, [&](const Chunk& chunk) {
    T weights[kChunk], occupied[kChunk], grad_key[kChunk];
    const int64_t* labels = out.labeled.labels + chunk.begin;
    const T* square_norms = out.labeled.square_norms + chunk.begin;
    for (int64_t i = 0; i < chunk.size; ++i) occupied[i] = labels[i] >= 0 ? T(1) : T(0);
    fill(grad_square_norm + chunk.begin, chunk.size, T(0));
    for (int64_t u = 0; u < keys; ++u) fill(grad_held + u * slots + chunk.begin, chunk.size, T(0));
    double* result = sums.get() + chunk.index * queries * width;
    T* grad_score = grad.scores + keys * slots + chunk.begin;
    for (int64_t b = 0; b < queries; ++b) {
      const T key_square = gram[b * rows + keys + b];
      const T* scores = out.retrieval_scores + b * slots + chunk.begin;
      exponentials(chunk.size, scores, square_norms, occupied, norm_from_square(key_square), weights);
      retrieval_backward(
          chunk.size, weights, labels, out.pseudo_labels[b], grad_positive[b], grad_negative[b], scores, square_norms,
          key_square, grad_score + b * slots, grad_square_norm + chunk.begin, grad_key);
      result[b * width + keys] = sum(grad_key, chunk.size);
    }
    const T* held = out.labeled.held + chunk.begin;
    add_products(chunk.size, keys, queries, grad_score, slots, gram, 1, rows, grad_held + chunk.begin, slots);
    inner_products(chunk.size, queries, grad_score, slots, keys, held, slots, result, width, 1);
    const T* kept = out.labeled.kept + chunk.begin;
    for (int64_t b = 0; b < queries; ++b) {
      for (int64_t i = 0; i < chunk.size; ++i) grad_score[b * slots + i] *= kept[i];
    }
  }, queries);
  for (int64_t c = 0; c < chunks; ++c) {
    const double* of_chunk = sums.get() + c * queries * width;
    for (int64_t b = 0; b < queries; ++b) {
      double* of_query = grad_gram + (keys + b) * rows;
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
  const double grad_loss = static_cast<double>(*grad.loss) / static_cast<double>(queries);
  const double beta = in.gates[2];
  Scratch<double> grad_gram(rows * rows);
  fill(grad_gram.get(), rows * rows, 0.0);

  Scratch<T> grad_unlabeled_norm(in.unlabeled.slots);
  fill(grad_unlabeled_norm.get(), in.unlabeled.slots, T(0));
  const int64_t own = keys * rows + keys;  // where the unlabelled keys' block of the Gram matrix begins
  const T unlabeled_gate = sigmoid(in.gates[1]);
  Reverse<T> unlabeled(
      in.unlabeled, out.unlabeled_record, queries, in.gram + own, rows, unlabeled_gate, in.scalar_keys,
      grad.unlabeled_scores, grad_unlabeled_norm.get(), nullptr, grad_gram.get() + own, parallel);
  double false_losses = 0.0;
  for (int64_t t = queries - 1; t >= 0; --t) {
    const double positive = out.false_sums[2 * t], negative = out.false_sums[2 * t + 1];
    const bool present = positive > 0.0;
    if (present) false_losses += share_loss(positive, negative);
    unlabeled.step_back(
        t, present ? grad_loss * beta * share_loss_grad_p(positive, negative) : 0.0,
        present ? grad_loss * beta * share_loss_grad_n(positive, negative) : 0.0);
  }

  Scratch<T> grad_norm(slots), grad_held(keys * slots);
  retrieve_backward(in, out, grad, grad_loss, grad_norm.get(), grad_held.get(), grad_gram.get(), parallel);
  const T gate = sigmoid(in.gates[0]);
  Reverse<T> labeled(
      in.labeled, out.labeled_record, keys, in.gram, rows, gate, in.scalar_keys, grad.scores, grad_norm.get(),
      grad_held.get(), grad_gram.get(), parallel);
  for (int64_t t = keys - 1; t >= 0; --t) labeled.step_back(t, 0.0, 0.0);

  for (int64_t k = 0; k < rows * rows; ++k) grad.gram[k] = static_cast<T>(grad_gram[k]);
  grad.gates[0] = static_cast<T>(labeled.grad_gate()) * sigmoid_backward(gate);
  grad.gates[1] = static_cast<T>(unlabeled.grad_gate()) * sigmoid_backward(unlabeled_gate);
  grad.gates[2] = static_cast<T>(grad_loss * false_losses);
}

template void scan_backward<float>(
    const ScanInput<float>&, const ScanOutput<float>&, const ScanGradient<float>&, ParallelFor);
template void scan_backward<double>(
    const ScanInput<double>&, const ScanOutput<double>&, const ScanGradient<double>&, ParallelFor);

}  // namespace dan_fast::DAN_FAST_ISA
