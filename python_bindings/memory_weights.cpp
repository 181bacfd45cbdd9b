// torch.ops.dan_fast.slot_softmax, its backward, and false_sample_sets: checks and output tensors.
// csrc/memory/softmax.h and false_sets.h say what is computed.
#include <algorithm>
#include <memory>
#include <optional>

#include "../csrc/memory/false_sets.h"
#include "../csrc/memory/softmax.h"
#include "dispatch.h"

namespace {

using namespace dan_fast;

// A task of fewer slots costs less than waking a thread.
constexpr int64_t kSlotsPerTask = 1 << 14;

int64_t rows_per_task(int64_t slots) { return std::max<int64_t>(1, kSlotsPerTask / std::max<int64_t>(1, slots)); }

// What a softmax over slots reads.
struct Scores {
  Scores(const Tensor& scores_, const Tensor& square_norms_, const Tensor& key_squares_)
      : dtype(scores_.scalar_type()) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "scores must be float32 or float64");
    STD_TORCH_CHECK(scores_.dim() == 2, "scores must be (B, s), got ", scores_.dim(), " dimensions");
    rows = scores_.size(0);
    slots = scores_.size(1);
    scores = fit("scores", scores_, "(B, s)", {rows, slots}, dtype, scores_);
    square_norms = fit("square_norms", square_norms_, "(s,)", {slots}, dtype, scores);
    key_squares = fit("key_squares", key_squares_, "(B,)", {rows}, dtype, scores);
  }

  static Tensor fit(
      const char* name, const Tensor& tensor, const char* shape, Sizes sizes, ScalarType type, const Tensor& like) {
    return checked(name, tensor, shape, sizes, type, like, "scores");
  }

  template <typename T>
  SlotScores<T> pointers() const {
    return {rows, slots, data<const T>(scores), data<const T>(square_norms), data<const T>(key_squares)};
  }

  Tensor empty(Sizes sizes) const { return torch::stable::new_empty(scores, sizes); }

  ScalarType dtype;
  int64_t rows, slots;
  Tensor scores, square_norms, key_squares;
};

Tensor slot_softmax(
    const Tensor& scores, const Tensor& square_norms, const Tensor& key_squares, std::optional<Tensor> occupied) {
  const Scores args(scores, square_norms, key_squares);
  if (occupied.has_value()) {
    occupied = args.fit("occupied", *occupied, "(s,)", {args.slots}, ScalarType::Bool, args.scores);
  }
  const Tensor result = args.empty({args.rows, args.slots});
  for_real(args.scores, [&](auto zero) {
    using T = decltype(zero);
    const auto in = args.pointers<T>();
    const uint8_t* occupied_slots = occupied.has_value() ? data<const uint8_t>(*occupied) : nullptr;
    T* weights = data<T>(result);
    const auto on_cpu = [&] {
      const auto kernel = DAN_FAST_KERNEL(slot_softmax<T>);
      torch::stable::parallel_for(0, args.rows, rows_per_task(args.slots), [&](int64_t first, int64_t last) {
        kernel(in, occupied_slots, weights, first, last);
      });
    };
    on_device_of(args.scores, "slot_softmax", on_cpu, [&](auto stream) {
      return launch_slot_softmax<T>(in, occupied_slots, weights, stream);
    });
  });
  return result;
}

template <typename T>
void softmax_backward_on_cpu(const SlotScores<T>& in, const SoftmaxGradient<T>& gradient, T* means) {
  const int64_t rows = in.rows, slots = in.slots;
  const auto find_means = DAN_FAST_KERNEL(mean_gradients<T>);
  torch::stable::parallel_for(0, rows, rows_per_task(slots), [&](int64_t first, int64_t last) {
    find_means(gradient, slots, means, first, last);
  });
  const int64_t blocks = (slots + kSoftmaxBlock - 1) / kSoftmaxBlock;
  const auto parts = std::make_unique<double[]>(static_cast<size_t>(blocks * rows));
  const auto differentiate = DAN_FAST_KERNEL(slot_softmax_backward<T>);
  torch::stable::parallel_for(0, blocks, rows_per_task(rows * kSoftmaxBlock), [&](int64_t first, int64_t last) {
    differentiate(in, gradient, means, parts.get(), first, last);
  });
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) sum += parts[static_cast<size_t>(block * rows + row)];
    gradient.key_squares[row] = static_cast<T>(sum);
  }
}

Tensors<3> slot_softmax_backward(
    const Tensor& grad_, const Tensor& weights_, const Tensor& scores, const Tensor& square_norms,
    const Tensor& key_squares) {
  const Scores args(scores, square_norms, key_squares);
  const int64_t rows = args.rows, slots = args.slots;
  const Tensor grad = args.fit("grad", grad_, "(B, s)", {rows, slots}, args.dtype, args.scores);
  const Tensor weights = args.fit("weights", weights_, "(B, s)", {rows, slots}, args.dtype, args.scores);
  const Tensor grad_scores = args.empty({rows, slots}), grad_square_norms = args.empty({slots});
  const Tensor grad_key_squares = args.empty({rows}), means = args.empty({rows});
  for_real(args.scores, [&](auto zero) {
    using T = decltype(zero);
    const auto in = args.pointers<T>();
    const SoftmaxGradient<T> gradient = {data<const T>(grad), data<const T>(weights), data<T>(grad_scores),
                                         data<T>(grad_square_norms), data<T>(grad_key_squares)};
    on_device_of(
        args.scores, "slot_softmax_backward", [&] { softmax_backward_on_cpu(in, gradient, data<T>(means)); },
        [&](auto stream) { return launch_slot_softmax_backward<T>(in, gradient, data<T>(means), stream); });
  });
  return {grad_scores, grad_square_norms, grad_key_squares};
}

Tensors<2> false_sample_sets(const Tensor& evaluation_, const Tensor& labels_, const Tensor& pseudo_labels_) {
  STD_TORCH_CHECK(evaluation_.dim() == 2, "evaluation must be (B, s), got ", evaluation_.dim(), " dimensions");
  const int64_t rows = evaluation_.size(0), slots = evaluation_.size(1);
  STD_TORCH_CHECK(slots < int64_t{1} << 31, "evaluation must have less than 2^31 slots, got ", slots);
  check_storage("evaluation", evaluation_);
  const Tensor evaluation = evaluation_.is_contiguous() ? evaluation_ : torch::stable::contiguous(evaluation_);
  const auto fit = [&](const char* name, const Tensor& tensor, const char* shape, int64_t size) {
    return checked(name, tensor, shape, {size}, ScalarType::Long, evaluation, "evaluation");
  };
  const Tensor labels = fit("labels", labels_, "(s,)", slots);
  const Tensor pseudo_labels = fit("pseudo_labels", pseudo_labels_, "(B,)", rows);
  const Tensor false_positive = torch::stable::new_empty(evaluation, {rows, slots}, ScalarType::Bool);
  const Tensor false_negative = torch::stable::new_empty(evaluation, {rows, slots}, ScalarType::Bool);
  const FalseSets sets = {rows,
                          slots,
                          evaluation.const_data_ptr(),
                          data<const int64_t>(labels),
                          data<const int64_t>(pseudo_labels),
                          data<uint8_t>(false_positive),
                          data<uint8_t>(false_negative)};
  for_storage(evaluation, [&](auto storage, auto) {
    using S = decltype(storage);
    const auto on_cpu = [&] {
      const auto kernel = DAN_FAST_KERNEL(find_false_sets<S>);
      torch::stable::parallel_for(
          0, rows, rows_per_task(4 * slots), [&](int64_t first, int64_t last) { kernel(sets, first, last); });
    };
    on_device_of(evaluation, "false_sample_sets", on_cpu, [&](auto stream) {
      return launch_false_sets<S>(sets, stream);
    });
  });
  return {false_positive, false_negative};
}

template <typename Library>
void implement(Library& m) {
  m.impl("slot_softmax", TORCH_BOX(&slot_softmax));
  m.impl("slot_softmax_backward", TORCH_BOX(&slot_softmax_backward));
  m.impl("false_sample_sets", TORCH_BOX(&false_sample_sets));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dan_fast, m) {
  m.def("slot_softmax(Tensor scores, Tensor square_norms, Tensor key_squares, Tensor? occupied) -> Tensor");
  m.def(
      "slot_softmax_backward(Tensor grad, Tensor weights, Tensor scores, Tensor square_norms, Tensor key_squares) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("false_sample_sets(Tensor evaluation, Tensor labels, Tensor pseudo_labels) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) { implement(m); }
#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) { implement(m); }
#endif
