// The CUDA kernels of the weights and of the false sets on host threads. As a library: a function for each kernel and
// type, over arrays that the caller owns. As a program (compiled with -DWEIGHTS_ON_HOST_MAIN): a few rows through each
// kernel, under the sanitizers.
#include "../cuda_on_host.h"

#include <memory>
#include <random>

#include "../../../csrc/memory/false_sets.cuh"
#include "../../../csrc/memory/softmax.cuh"

using namespace dan_fast;

namespace {

template <typename T>
void softmax(
    unsigned threads, const SlotScores<T>& in, const uint8_t* occupied, T* weights) {
  const auto shared = std::make_unique<SoftmaxShared<T>>();
  on_host::launch(static_cast<unsigned>(in.rows), threads, [&] { slot_softmax_row(in, occupied, weights, *shared); });
}

template <typename T>
void softmax_backward(unsigned threads, const SlotScores<T>& in, const SoftmaxGradient<T>& gradient, T* means) {
  const auto shared = std::make_unique<SoftmaxShared<T>>();
  on_host::launch(static_cast<unsigned>(in.rows), threads, [&] {
    slot_softmax_backward_row(in, gradient, means, *shared);
  });
  const auto columns = std::make_unique<ColumnShared<T>>();
  on_host::launch(static_cast<unsigned>((in.slots + kLanes - 1) / kLanes), threads, [&] {
    slot_softmax_backward_slots(in, gradient, means, *columns);
  });
}

template <typename S>
void false_sets(unsigned threads, const FalseSets& sets) {
  const auto shared = std::make_unique<FalseSetsShared<ValueKey<S>>>();
  on_host::launch(static_cast<unsigned>(sets.rows), threads, [&] { FalseSetsRow<S>(sets, *shared).run(); });
}

}  // namespace

#define SOFTMAX_ON_HOST(name, T)                                                                                   \
  extern "C" void softmax_##name(                                                                                  \
      unsigned threads, int64_t rows, int64_t slots, const T* scores, const T* square_norms, const T* key_squares, \
      const uint8_t* occupied, T* weights) {                                                                       \
    softmax<T>(threads, {rows, slots, scores, square_norms, key_squares}, occupied, weights);                      \
  }                                                                                                                \
  extern "C" void softmax_backward_##name(                                                                         \
      unsigned threads, int64_t rows, int64_t slots, const T* scores, const T* square_norms, const T* key_squares, \
      const T* grad, const T* weights, T* grad_scores, T* grad_square_norms, T* grad_key_squares, T* means) {      \
    softmax_backward<T>(                                                                                           \
        threads, {rows, slots, scores, square_norms, key_squares},                                                 \
        {grad, weights, grad_scores, grad_square_norms, grad_key_squares}, means);                                 \
  }
SOFTMAX_ON_HOST(float32, float)
SOFTMAX_ON_HOST(float64, double)

#define FALSE_SETS_ON_HOST(name, S)                                                                            \
  extern "C" void false_sets_##name(                                                                           \
      unsigned threads, int64_t rows, int64_t slots, const void* evaluation, const int64_t* labels,            \
      const int64_t* pseudo_labels, uint8_t* false_positive, uint8_t* false_negative) {                        \
    false_sets<S>(threads, {rows, slots, evaluation, labels, pseudo_labels, false_positive, false_negative}); \
  }
FALSE_SETS_ON_HOST(float64, double)
FALSE_SETS_ON_HOST(float32, float)
FALSE_SETS_ON_HOST(float16, Float16)
FALSE_SETS_ON_HOST(bfloat16, BFloat16)

#ifdef WEIGHTS_ON_HOST_MAIN
int main() {
  constexpr int64_t kRows = 3, kSlots = 150;
  std::mt19937 random(7);
  std::uniform_real_distribution<float> number(-1.0f, 1.0f);
  const auto numbers = [&](int64_t size, float offset) {
    std::vector<float> result(static_cast<size_t>(size));
    for (float& x : result) x = number(random) + offset;
    return result;
  };
  const auto scores = numbers(kRows * kSlots, 0.0f), norms = numbers(kSlots, 2.0f), keys = numbers(kRows, 2.0f);
  const auto grad = numbers(kRows * kSlots, 0.0f);
  std::vector<float> weights(scores.size()), grad_scores(scores.size()), grad_norms(kSlots);
  std::vector<float> grad_keys(kRows), means(kRows);
  std::vector<uint8_t> occupied(kSlots), positive(scores.size()), negative(scores.size());
  std::vector<int64_t> labels(kSlots), pseudo_labels = {0, 1, -1};
  for (size_t i = 0; i < labels.size(); ++i) {
    labels[i] = static_cast<int64_t>(random() % 4) - 1;
    occupied[i] = labels[i] >= 0;
  }
  softmax_float32(64, kRows, kSlots, scores.data(), norms.data(), keys.data(), occupied.data(), weights.data());
  softmax_backward_float32(
      64, kRows, kSlots, scores.data(), norms.data(), keys.data(), grad.data(), weights.data(), grad_scores.data(),
      grad_norms.data(), grad_keys.data(), means.data());
  // Weights in two steps: equal ones are told apart by their slots.
  for (float& x : weights) x = x > 0.008f ? 0.01f : 0.005f;
  false_sets_float32(
      64, kRows, kSlots, weights.data(), labels.data(), pseudo_labels.data(), positive.data(), negative.data());
}
#endif
