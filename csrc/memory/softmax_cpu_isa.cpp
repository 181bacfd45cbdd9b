#include "cpu_loops.h"
#include "softmax.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

static_assert(kSoftmaxBlock == kChunk);

template <typename T>
void exponentials(
    int64_t size, const T* __restrict scores, const T* __restrict square_norms, T length, T* __restrict result) {
  for (int64_t i = 0; i < size; ++i) result[i] = attention(scores[i], square_norms[i], length);
}

template <typename T>
void empty_slots(int64_t size, const uint8_t* __restrict occupied, T* __restrict result) {
  for (int64_t i = 0; i < size; ++i) result[i] = occupied[i] != 0 ? result[i] : T(0);
}

template <typename T>
void normalise(int64_t size, T total, T* weights) {
  for (int64_t i = 0; i < size; ++i) weights[i] = normalised(weights[i], total);
}

template <typename T>
void weigh(int64_t size, const T* __restrict weights, const T* __restrict grad, T* __restrict result) {
  for (int64_t i = 0; i < size; ++i) result[i] = weighted_gradient(weights[i], grad[i]);
}

template <typename T>
void differentiate(
    int64_t size, const T* __restrict weights, const T* __restrict grad, T grad_mean, const T* __restrict scores,
    const T* __restrict square_norms, T key_square, T* __restrict grad_score, double* __restrict grad_square_norm,
    T* __restrict grad_key_square) {
  for (int64_t i = 0; i < size; ++i) {
    const auto result = attention_backward(weights[i], grad[i], grad_mean, scores[i], square_norms[i], key_square);
    grad_score[i] = result.score;
    grad_square_norm[i] += static_cast<double>(result.square_norm);
    grad_key_square[i] = result.key_square;
  }
}

// body(begin, size) for [0, slots) in blocks.
template <typename Body>
void for_blocks(int64_t slots, const Body& body) {
  for (int64_t begin = 0; begin < slots; begin += kSoftmaxBlock) {
    body(begin, slots - begin < kSoftmaxBlock ? slots - begin : kSoftmaxBlock);
  }
}

}  // namespace

template <typename T>
void slot_softmax(const SlotScores<T>& in, const uint8_t* occupied, T* weights, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T length = finite_key_length(in.key_squares[row]);
    const T* scores = in.scores + row * in.slots;
    T* result = weights + row * in.slots;
    double total = 0.0;
    for_blocks(in.slots, [&](int64_t begin, int64_t size) {
      exponentials(size, scores + begin, in.square_norms + begin, length, result + begin);
      if (occupied != nullptr) empty_slots(size, occupied + begin, result + begin);
      total += sum(result + begin, size);
    });
    normalise(in.slots, static_cast<T>(total), result);
  }
}

template <typename T>
void mean_gradients(const SoftmaxGradient<T>& gradient, int64_t slots, T* means, int64_t first, int64_t last) {
  T terms[kSoftmaxBlock];
  for (int64_t row = first; row < last; ++row) {
    double total = 0.0;
    for_blocks(slots, [&](int64_t begin, int64_t size) {
      weigh(size, gradient.weights + row * slots + begin, gradient.grad + row * slots + begin, terms);
      total += sum(terms, size);
    });
    means[row] = static_cast<T>(total);
  }
}

template <typename T>
void slot_softmax_backward(
    const SlotScores<T>& in, const SoftmaxGradient<T>& gradient, const T* means, double* key_parts, int64_t first,
    int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kSoftmaxBlock, left = in.slots - begin;
    const int64_t size = left < kSoftmaxBlock ? left : kSoftmaxBlock;
    T grad_key_square[kSoftmaxBlock];
    double grad_square_norm[kSoftmaxBlock] = {};
    for (int64_t row = 0; row < in.rows; ++row) {
      const int64_t at = row * in.slots + begin;
      differentiate(
          size, gradient.weights + at, gradient.grad + at, means[row], in.scores + at, in.square_norms + begin,
          in.key_squares[row], gradient.scores + at, grad_square_norm, grad_key_square);
      key_parts[block * in.rows + row] = sum(grad_key_square, size);
    }
    for (int64_t i = 0; i < size; ++i) gradient.square_norms[begin + i] = static_cast<T>(grad_square_norm[i]);
  }
}

#define DAN_FAST_INSTANTIATE(T)                                                                    \
  template void slot_softmax<T>(const SlotScores<T>&, const uint8_t*, T*, int64_t, int64_t);          \
  template void mean_gradients<T>(const SoftmaxGradient<T>&, int64_t, T*, int64_t, int64_t);       \
  template void slot_softmax_backward<T>(                                                          \
      const SlotScores<T>&, const SoftmaxGradient<T>&, const T*, double*, int64_t, int64_t);
DAN_FAST_INSTANTIATE(float)
DAN_FAST_INSTANTIATE(double)

}  // namespace dan_fast::DAN_FAST_ISA
