// torch.ops.dan_fast.slot_softmax, its backward, and false_sample_sets: checks, output tensors, and which kernel serves
// which device. csrc/memory/softmax.h and false_sets.h say what is computed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "../csrc/memory/false_sets.h"
#include "../csrc/memory/softmax.h"

#ifdef DAN_FAST_CUDA
#include "../csrc/memory/false_sets_launch.h"
#include "../csrc/memory/softmax_launch.h"
#include "cuda_call.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Fewer slots than these a thread are not worth waking one.
constexpr int64_t kSlotsPerTask = 1 << 14;

int64_t rows_per_task(int64_t slots) { return std::max<int64_t>(1, kSlotsPerTask / std::max<int64_t>(1, slots)); }

// Contiguous, of this shape and dtype, where `like` is.
Tensor checked(
    const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, ScalarType dtype,
    const Tensor& like) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dim++) == size;
  STD_TORCH_CHECK(fits, name, " has a shape that does not fit the other arguments");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has a dtype that does not fit the other arguments");
  STD_TORCH_CHECK(
      tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
      " is on another device than the other arguments");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// What a softmax over slots reads.
struct Scores {
  Scores(const Tensor& scores_, const Tensor& square_norms_, const Tensor& key_squares_)
      : dtype(scores_.scalar_type()) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "scores must be float32 or float64");
    STD_TORCH_CHECK(scores_.dim() == 2, "scores must be (B, s), got ", scores_.dim(), " dimensions");
    rows = scores_.size(0);
    slots = scores_.size(1);
    scores = checked("scores", scores_, {rows, slots}, dtype, scores_);
    square_norms = checked("square_norms", square_norms_, {slots}, dtype, scores);
    key_squares = checked("key_squares", key_squares_, {rows}, dtype, scores);
  }

  template <typename T>
  dan_fast::SlotScores<T> pointers() const {
    return {rows, slots, data<T>(scores), data<T>(square_norms), data<T>(key_squares)};
  }

  Tensor empty(std::initializer_list<int64_t> sizes) const { return torch::stable::new_empty(scores, sizes); }

  // function(T{}) for the dtype.
  template <typename Function>
  void for_type(const Function& function) const {
    dtype == ScalarType::Double ? function(double{}) : function(float{});
  }

  ScalarType dtype;
  int64_t rows, slots;
  Tensor scores, square_norms, key_squares;
};

struct SoftmaxArguments : Scores {
  SoftmaxArguments(
      const Tensor& scores_, const Tensor& square_norms_, const Tensor& key_squares_,
      const std::optional<Tensor>& occupied_)
      : Scores(scores_, square_norms_, key_squares_), weights(empty({rows, slots})) {
    if (occupied_.has_value()) occupied = checked("occupied", *occupied_, {slots}, ScalarType::Bool, scores);
  }

  const uint8_t* occupied_slots() const { return occupied.has_value() ? data<uint8_t>(*occupied) : nullptr; }

  std::optional<Tensor> occupied;
  Tensor weights;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

struct BackwardArguments : Scores {
  BackwardArguments(
      const Tensor& grad_, const Tensor& weights_, const Tensor& scores_, const Tensor& square_norms_,
      const Tensor& key_squares_)
      : Scores(scores_, square_norms_, key_squares_),
        grad(checked("grad", grad_, {rows, slots}, dtype, scores)),
        weights(checked("weights", weights_, {rows, slots}, dtype, scores)),
        by_scores(empty({rows, slots})),
        by_square_norms(empty({slots})),
        by_key_squares(empty({rows})) {}

  template <typename T>
  dan_fast::SoftmaxGradient<T> gradient() {
    const Tensor &in = grad, &result = weights;
    return {data<T>(in), data<T>(result), data<T>(by_scores), data<T>(by_square_norms), data<T>(by_key_squares)};
  }

  Gradients result() const { return {by_scores, by_square_norms, by_key_squares}; }

  Tensor grad, weights, by_scores, by_square_norms, by_key_squares;
};

Tensor slot_softmax_cpu(
    const Tensor& scores, const Tensor& square_norms, const Tensor& key_squares, std::optional<Tensor> occupied) {
  SoftmaxArguments args(scores, square_norms, key_squares, occupied);
  args.for_type([&](auto zero) {
    using T = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(slot_softmax<T>);
    const auto in = args.pointers<T>();
    const uint8_t* occupied_slots = args.occupied_slots();
    T* weights = data<T>(args.weights);
    torch::stable::parallel_for(0, args.rows, rows_per_task(args.slots), [&](int64_t first, int64_t last) {
      kernel(in, occupied_slots, weights, first, last);
    });
  });
  return args.weights;
}

Gradients slot_softmax_backward_cpu(
    const Tensor& grad, const Tensor& weights, const Tensor& scores, const Tensor& square_norms,
    const Tensor& key_squares) {
  BackwardArguments args(grad, weights, scores, square_norms, key_squares);
  args.for_type([&](auto zero) {
    using T = decltype(zero);
    const auto in = args.pointers<T>();
    const auto gradient = args.gradient<T>();
    const int64_t rows = args.rows, slots = args.slots;
    const auto means = std::make_unique<T[]>(static_cast<size_t>(rows));
    const auto find_means = DAN_FAST_KERNEL(mean_gradients<T>);
    torch::stable::parallel_for(0, rows, rows_per_task(slots), [&](int64_t first, int64_t last) {
      find_means(gradient, slots, means.get(), first, last);
    });
    const int64_t blocks = (slots + dan_fast::kSoftmaxBlock - 1) / dan_fast::kSoftmaxBlock;
    const auto parts = std::make_unique<double[]>(static_cast<size_t>(blocks * rows));
    const auto differentiate = DAN_FAST_KERNEL(slot_softmax_backward<T>);
    const int64_t grain = rows_per_task(rows * dan_fast::kSoftmaxBlock);
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
      differentiate(in, gradient, means.get(), parts.get(), first, last);
    });
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; ++block) sum += parts[static_cast<size_t>(block * rows + row)];
      gradient.key_squares[row] = static_cast<T>(sum);
    }
  });
  return args.result();
}

struct SetsArguments {
  SetsArguments(const Tensor& evaluation_, const Tensor& labels_, const Tensor& pseudo_labels_)
      : dtype(evaluation_.scalar_type()) {
    STD_TORCH_CHECK(evaluation_.dim() == 2, "evaluation must be (B, s), got ", evaluation_.dim(), " dimensions");
    const int64_t rows = evaluation_.size(0), slots = evaluation_.size(1);
    STD_TORCH_CHECK(slots < int64_t{1} << 31, "evaluation must have less than 2^31 slots, got ", slots);
    evaluation = checked("evaluation", evaluation_, {rows, slots}, dtype, evaluation_);
    labels = checked("labels", labels_, {slots}, ScalarType::Long, evaluation);
    pseudo_labels = checked("pseudo_labels", pseudo_labels_, {rows}, ScalarType::Long, evaluation);
    false_positive = torch::stable::new_empty(evaluation, {rows, slots}, ScalarType::Bool);
    false_negative = torch::stable::new_empty(evaluation, {rows, slots}, ScalarType::Bool);
    sets = {rows,
            slots,
            evaluation.const_data_ptr(),
            data<int64_t>(static_cast<const Tensor&>(labels)),
            data<int64_t>(static_cast<const Tensor&>(pseudo_labels)),
            data<uint8_t>(false_positive),
            data<uint8_t>(false_negative)};
  }

  // function(Format{}) for the dtype of evaluation.
  template <typename Function>
  void for_format(const Function& function) const {
    switch (dtype) {
      case ScalarType::Double:
        return function(dan_fast::Binary64{});
      case ScalarType::Float:
        return function(dan_fast::Binary32{});
      case ScalarType::Half:
        return function(dan_fast::Binary16{});
      case ScalarType::BFloat16:
        return function(dan_fast::Brain16{});
      default:
        STD_TORCH_CHECK(false, "evaluation must be float64, float32, float16 or bfloat16");
    }
  }

  ScalarType dtype;
  Tensor evaluation, labels, pseudo_labels, false_positive, false_negative;
  dan_fast::FalseSets sets;
};

std::tuple<Tensor, Tensor> false_sample_sets_cpu(
    const Tensor& evaluation, const Tensor& labels, const Tensor& pseudo_labels) {
  SetsArguments args(evaluation, labels, pseudo_labels);
  args.for_format([&](auto format) {
    const auto kernel = DAN_FAST_KERNEL(find_false_sets<decltype(format)>);
    const int64_t grain = rows_per_task(4 * args.sets.slots);
    torch::stable::parallel_for(
        0, args.sets.rows, grain, [&](int64_t first, int64_t last) { kernel(args.sets, first, last); });
  });
  return {args.false_positive, args.false_negative};
}

#ifdef DAN_FAST_CUDA

Tensor slot_softmax_cuda(
    const Tensor& scores, const Tensor& square_norms, const Tensor& key_squares, std::optional<Tensor> occupied) {
  SoftmaxArguments args(scores, square_norms, key_squares, occupied);
  args.for_type([&](auto zero) {
    using T = decltype(zero);
    dan_fast::on_device_of(args.scores, "slot_softmax", [&](void* stream) {
      return dan_fast::launch_slot_softmax<T>(
          args.pointers<T>(), args.occupied_slots(), data<T>(args.weights), stream);
    });
  });
  return args.weights;
}

Gradients slot_softmax_backward_cuda(
    const Tensor& grad, const Tensor& weights, const Tensor& scores, const Tensor& square_norms,
    const Tensor& key_squares) {
  BackwardArguments args(grad, weights, scores, square_norms, key_squares);
  Tensor means = args.empty({args.rows});
  args.for_type([&](auto zero) {
    using T = decltype(zero);
    dan_fast::on_device_of(args.scores, "slot_softmax_backward", [&](void* stream) {
      return dan_fast::launch_slot_softmax_backward<T>(
          args.pointers<T>(), args.gradient<T>(), data<T>(means), stream);
    });
  });
  return args.result();
}

std::tuple<Tensor, Tensor> false_sample_sets_cuda(
    const Tensor& evaluation, const Tensor& labels, const Tensor& pseudo_labels) {
  SetsArguments args(evaluation, labels, pseudo_labels);
  args.for_format([&](auto format) {
    dan_fast::on_device_of(args.evaluation, "false_sample_sets", [&](void* stream) {
      return dan_fast::launch_false_sets<decltype(format)>(args.sets, stream);
    });
  });
  return {args.false_positive, args.false_negative};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dan_fast, m) {
  m.def("slot_softmax(Tensor scores, Tensor square_norms, Tensor key_squares, Tensor? occupied) -> Tensor");
  m.def(
      "slot_softmax_backward(Tensor grad, Tensor weights, Tensor scores, Tensor square_norms, Tensor key_squares) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("false_sample_sets(Tensor evaluation, Tensor labels, Tensor pseudo_labels) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) {
  m.impl("slot_softmax", TORCH_BOX(&slot_softmax_cpu));
  m.impl("slot_softmax_backward", TORCH_BOX(&slot_softmax_backward_cpu));
  m.impl("false_sample_sets", TORCH_BOX(&false_sample_sets_cpu));
}

#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) {
  m.impl("slot_softmax", TORCH_BOX(&slot_softmax_cuda));
  m.impl("slot_softmax_backward", TORCH_BOX(&slot_softmax_backward_cuda));
  m.impl("false_sample_sets", TORCH_BOX(&false_sample_sets_cuda));
}
#endif
