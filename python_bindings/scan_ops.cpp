// torch.ops.dan_fast.memory_scan and its backward: checks, output tensors and scan.h's structs for every device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <tuple>
#include <vector>

#include "../csrc/memory/scan_cpu.h"

#ifdef DAN_FAST_CUDA
#include "../csrc/memory/scan_launch.h"
#include "cuda_call.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// What an operator calls its tensors; MemoryBefore and ScanOutput have the same order.
constexpr const char* kMemory[] = {"square_norms", "usage", "evaluation", "labels", "sample_ids", "least_used"};
constexpr size_t kMemoryTensors = 6, kAfterTensors = 8, kRecordTensors = 5;

bool has_sizes(const Tensor& tensor, Sizes sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t k = 0; k < sizes.size(); ++k) {
    if (tensor.size(static_cast<int64_t>(k)) != sizes[k]) return false;
  }
  return true;
}

bool on_one_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

Tensor checked(const Tensor& tensor, Sizes sizes, ScalarType dtype, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(has_sizes(tensor, sizes), name, " of memory_scan has a shape that does not fit the other arguments");
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, name, " of memory_scan has a dtype that does not fit the other arguments");
  STD_TORCH_CHECK(on_one_device(tensor, like), name, " of memory_scan is on another device than scores");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensors checked_memory(const Tensors& memory, int64_t slots, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(memory.size() == kMemoryTensors, name, " must hold 6 tensors, see the schema of memory_scan");
  STD_TORCH_CHECK(slots >= 1, name, " has no slot");
  Tensors result;
  for (size_t k = 0; k < kMemoryTensors; ++k) {
    const ScalarType dtype = k < 3 ? like.scalar_type() : ScalarType::Long;
    result.push_back(k < 5 ? checked(memory[k], {slots}, dtype, like, kMemory[k])
                           : checked(memory[k], {}, dtype, like, kMemory[k]));
  }
  return result;
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
dan_fast::MemoryBefore<T> memory_before(const Tensors& m, int64_t slots) {
  const auto at = [&](size_t k) { return m[k].const_data_ptr(); };
  return {slots, static_cast<const T*>(at(0)), static_cast<const T*>(at(1)), static_cast<const T*>(at(2)),
          static_cast<const int64_t*>(at(3)), static_cast<const int64_t*>(at(4)), static_cast<const int64_t*>(at(5))};
}

// The arguments of a scan, checked and contiguous.
class Arguments {
 public:
  Arguments(
      const Tensor& scores, const Tensor& unlabeled_scores, const Tensor& gram, const Tensor& gates,
      const Tensor& labels, const Tensor& sample_ids, const Tensors& labeled, const Tensors& unlabeled, double decay,
      double decay_unlabeled, bool scalar_keys)
      : decay_(decay), decay_unlabeled_(decay_unlabeled), scalar_keys_(scalar_keys) {
    dtype_ = scores.scalar_type();
    STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::Double, "scores must be float32 or float64");
    STD_TORCH_CHECK(labels.dim() == 1, "labels must be (B,), got ", labels.dim(), " dimensions");
    STD_TORCH_CHECK(sample_ids.dim() == 1, "sample_ids must be (B',), got ", sample_ids.dim(), " dimensions");
    STD_TORCH_CHECK(scores.dim() == 2, "scores must be (B + B', s1), got ", scores.dim(), " dimensions");
    STD_TORCH_CHECK(
        unlabeled_scores.dim() == 2, "unlabeled_scores must be (B', s2), got ", unlabeled_scores.dim(), " dimensions");
    batch = labels.size(0);
    unlabeled_batch = sample_ids.size(0);
    slots = scores.size(1);
    unlabeled_slots = unlabeled_scores.size(1);
    const int64_t rows = batch + unlabeled_batch;
    scores_ = checked(scores, {rows, slots}, dtype_, scores, "scores");
    unlabeled_scores_ =
        checked(unlabeled_scores, {unlabeled_batch, unlabeled_slots}, dtype_, scores, "unlabeled_scores");
    gram_ = checked(gram, {rows, rows}, dtype_, scores, "gram");
    gates_ = checked(gates, {3}, dtype_, scores, "gates");
    labels_ = checked(labels, {batch}, ScalarType::Long, scores, "labels");
    sample_ids_ = checked(sample_ids, {unlabeled_batch}, ScalarType::Long, scores, "sample_ids");
    labeled_ = checked_memory(labeled, slots, scores, "labeled");
    unlabeled_ = checked_memory(unlabeled, unlabeled_slots, scores, "unlabeled");
  }

  ScalarType dtype() const { return dtype_; }
  const Tensor& like() const { return scores_; }

  Tensor empty(Sizes sizes) const { return empty(sizes, dtype_); }
  Tensor empty(Sizes sizes, ScalarType dtype) const { return torch::stable::new_empty(scores_, sizes, dtype); }

  template <typename T>
  dan_fast::ScanInput<T> input() const {
    dan_fast::ScanInput<T> in;
    in.batch = batch;
    in.unlabeled_batch = unlabeled_batch;
    in.scores = static_cast<const T*>(scores_.const_data_ptr());
    in.unlabeled_scores = static_cast<const T*>(unlabeled_scores_.const_data_ptr());
    in.gram = static_cast<const T*>(gram_.const_data_ptr());
    in.gates = static_cast<const T*>(gates_.const_data_ptr());
    in.labels = static_cast<const int64_t*>(labels_.const_data_ptr());
    in.sample_ids = static_cast<const int64_t*>(sample_ids_.const_data_ptr());
    in.labeled = memory_before<T>(labeled_, slots);
    in.unlabeled = memory_before<T>(unlabeled_, unlabeled_slots);
    in.decay = static_cast<T>(decay_);
    in.decay_unlabeled = static_cast<T>(decay_unlabeled_);
    in.scalar_keys = scalar_keys_;
    return in;
  }

  int64_t batch, unlabeled_batch, slots, unlabeled_slots;

 private:
  ScalarType dtype_;
  Tensor scores_, unlabeled_scores_, gram_, gates_, labels_, sample_ids_;
  Tensors labeled_, unlabeled_;
  double decay_, decay_unlabeled_;
  bool scalar_keys_;
};

struct Spec {
  std::vector<int64_t> sizes;
  ScalarType dtype;
};

// What memory_scan returns:
// 0 loss (), 1 pseudo_labels (B',), 2 fault () int32;
// 3-10 M after, 11-18 M' after: square_norms, usage, evaluation, kept (s,), held (steps, s), labels, sample_ids (s,),
//   least_used ();
// 19-23 the record of M, 24-28 of M': before, weights, evaluation, square_norms (steps, s), events (steps, s) uint8;
// 29 retrieval_scores (B', s1), 30 retrieval_sums (B', 4), 31 false_sums (B', 2).
std::vector<Spec> outputs_of(const Arguments& args) {
  const ScalarType real = args.dtype(), whole = ScalarType::Long;
  const int64_t queries = args.unlabeled_batch;
  std::vector<Spec> specs = {{{}, real}, {{queries}, whole}, {{}, ScalarType::Int}};
  const int64_t steps[] = {args.batch, queries}, slots[] = {args.slots, args.unlabeled_slots};
  for (int m = 0; m < 2; ++m) {
    specs.insert(specs.end(), 4, {{slots[m]}, real});
    specs.push_back({{steps[m], slots[m]}, real});
    specs.insert(specs.end(), 2, {{slots[m]}, whole});
    specs.push_back({{}, whole});
  }
  for (int m = 0; m < 2; ++m) {
    specs.insert(specs.end(), 4, {{steps[m], slots[m]}, real});
    specs.push_back({{steps[m], slots[m]}, ScalarType::Byte});
  }
  specs.push_back({{queries, args.slots}, real});
  specs.push_back({{queries, 4}, real});
  specs.push_back({{queries, 2}, real});
  return specs;
}

Tensors empty_outputs(const Arguments& args) {
  Tensors outputs;
  for (const Spec& spec : outputs_of(args)) outputs.push_back(args.empty(spec.sizes, spec.dtype));
  return outputs;
}

void check_outputs(const Arguments& args, const Tensors& outputs) {
  const std::vector<Spec> specs = outputs_of(args);
  bool same = outputs.size() == specs.size();
  for (size_t k = 0; same && k < specs.size(); ++k) {
    same = has_sizes(outputs[k], specs[k].sizes) && outputs[k].scalar_type() == specs[k].dtype &&
           outputs[k].is_contiguous() && on_one_device(outputs[k], args.like());
  }
  STD_TORCH_CHECK(same, "outputs must be what memory_scan returned for the same arguments");
}

// The pointers of what empty_outputs has made.
template <typename T>
dan_fast::ScanOutput<T> output_of(const Tensors& tensors) {
  const Tensor* next = tensors.data();
  const auto after = [&]() -> dan_fast::MemoryAfter<T> {
    const Tensor* m = next;
    next += kAfterTensors;
    return {pointer<T>(m[0]), pointer<T>(m[1]), pointer<T>(m[2]), pointer<T>(m[3]), pointer<T>(m[4]),
            pointer<int64_t>(m[5]), pointer<int64_t>(m[6]), pointer<int64_t>(m[7])};
  };
  const auto record = [&]() -> dan_fast::WriteRecord<T> {
    const Tensor* m = next;
    next += kRecordTensors;
    return {pointer<T>(m[0]), pointer<T>(m[1]), pointer<T>(m[2]), pointer<T>(m[3]), pointer<uint8_t>(m[4])};
  };
  dan_fast::ScanOutput<T> out;
  out.loss = pointer<T>(*next++);
  out.pseudo_labels = pointer<int64_t>(*next++);
  out.fault = pointer<int32_t>(*next++);
  out.labeled = after();
  out.unlabeled = after();
  out.labeled_record = record();
  out.unlabeled_record = record();
  out.retrieval_scores = pointer<T>(*next++);
  out.retrieval_sums = pointer<T>(*next++);
  out.false_sums = pointer<T>(*next++);
  return out;
}

struct Gradients {
  Gradients(const Arguments& args, const Tensor& grad_loss)
      : loss(checked(grad_loss, {}, args.dtype(), args.like(), "grad_loss")),
        scores(args.empty({args.batch + args.unlabeled_batch, args.slots})),
        unlabeled_scores(args.empty({args.unlabeled_batch, args.unlabeled_slots})),
        gram(args.empty({args.batch + args.unlabeled_batch, args.batch + args.unlabeled_batch})),
        gates(args.empty({3})) {}

  template <typename T>
  dan_fast::ScanGradient<T> pointers() const {
    return {static_cast<const T*>(loss.const_data_ptr()), pointer<T>(scores), pointer<T>(unlabeled_scores),
            pointer<T>(gram), pointer<T>(gates)};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors() const { return {scores, unlabeled_scores, gram, gates}; }

  Tensor loss, scores, unlabeled_scores, gram, gates;
};

void on_threads(int64_t count, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(
      0, count, grain, [=](int64_t first, int64_t last) { task(context, first, last); });
}

template <typename T>
void forward_on_cpu(const Arguments& args, const Tensors& outputs) {
  DAN_FAST_KERNEL(scan_forward<T>)(args.input<T>(), output_of<T>(outputs), on_threads);
}

template <typename T>
void backward_on_cpu(const Arguments& args, const Tensors& outputs, const Gradients& grads) {
  DAN_FAST_KERNEL(scan_backward<T>)(args.input<T>(), output_of<T>(outputs), grads.pointers<T>(), on_threads);
}

#ifdef DAN_FAST_CUDA

// Calls `launch(workspace, stream)` on the device of the arguments.
template <typename T, typename Launch>
void on_cuda(const Arguments& args, const char* what, const Launch& launch) {
  dan_fast::on_device_of(args.like(), what, [&](void* stream) {
    int64_t bytes = 0;
    const dan_fast::ScanSizes sizes = {args.batch, args.unlabeled_batch, args.slots, args.unlabeled_slots};
    const int status = dan_fast::scan_workspace_bytes<T>(sizes, &bytes);
    if (status != 0) return status;
    // From the caching allocator, which gives it to the next kernel of this stream only.
    const Tensor workspace = args.empty({bytes}, ScalarType::Byte);
    return launch(workspace.mutable_data_ptr(), stream);
  });
}

template <typename T>
void forward_on_cuda(const Arguments& args, const Tensors& outputs) {
  on_cuda<T>(args, "memory_scan", [&](void* workspace, void* stream) {
    return dan_fast::launch_scan_forward(args.input<T>(), output_of<T>(outputs), workspace, stream);
  });
}

template <typename T>
void backward_on_cuda(const Arguments& args, const Tensors& outputs, const Gradients& grads) {
  on_cuda<T>(args, "memory_scan_backward", [&](void* workspace, void* stream) {
    return dan_fast::launch_scan_backward(
        args.input<T>(), output_of<T>(outputs), grads.pointers<T>(), workspace, stream);
  });
}

#endif

void run_forward(const Arguments& args, const Tensors& outputs) {
  const bool wide = args.dtype() == ScalarType::Double;
#ifdef DAN_FAST_CUDA
  if (args.like().is_cuda()) return (wide ? forward_on_cuda<double> : forward_on_cuda<float>)(args, outputs);
#endif
  (wide ? forward_on_cpu<double> : forward_on_cpu<float>)(args, outputs);
}

void run_backward(const Arguments& args, const Tensors& outputs, const Gradients& grads) {
  const bool wide = args.dtype() == ScalarType::Double;
#ifdef DAN_FAST_CUDA
  if (args.like().is_cuda()) return (wide ? backward_on_cuda<double> : backward_on_cuda<float>)(args, outputs, grads);
#endif
  (wide ? backward_on_cpu<double> : backward_on_cpu<float>)(args, outputs, grads);
}

Tensors memory_scan(
    const Tensor& scores, const Tensor& unlabeled_scores, const Tensor& gram, const Tensor& gates,
    const Tensor& labels, const Tensor& sample_ids, Tensors labeled, Tensors unlabeled, double decay,
    double decay_unlabeled, bool scalar_keys) {
  const Arguments args(
      scores, unlabeled_scores, gram, gates, labels, sample_ids, labeled, unlabeled, decay, decay_unlabeled,
      scalar_keys);
  Tensors outputs = empty_outputs(args);
  run_forward(args, outputs);
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> memory_scan_backward(
    const Tensor& grad_loss, const Tensor& scores, const Tensor& unlabeled_scores, const Tensor& gram,
    const Tensor& gates, const Tensor& labels, const Tensor& sample_ids, Tensors labeled, Tensors unlabeled,
    double decay, double decay_unlabeled, bool scalar_keys, Tensors outputs) {
  const Arguments args(
      scores, unlabeled_scores, gram, gates, labels, sample_ids, labeled, unlabeled, decay, decay_unlabeled,
      scalar_keys);
  check_outputs(args, outputs);
  const Gradients grads(args, grad_loss);
  run_backward(args, outputs, grads);
  return grads.tensors();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dan_fast, m) {
  m.def(
      "memory_scan(Tensor scores, Tensor unlabeled_scores, Tensor gram, Tensor gates, Tensor labels, "
      "Tensor sample_ids, Tensor[] labeled, Tensor[] unlabeled, float decay, float decay_unlabeled, "
      "bool scalar_keys) -> Tensor[]");
  m.def(
      "memory_scan_backward(Tensor grad_loss, Tensor scores, Tensor unlabeled_scores, Tensor gram, Tensor gates, "
      "Tensor labels, Tensor sample_ids, Tensor[] labeled, Tensor[] unlabeled, float decay, float decay_unlabeled, "
      "bool scalar_keys, Tensor[] outputs) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) {
  m.impl("memory_scan", TORCH_BOX(&memory_scan));
  m.impl("memory_scan_backward", TORCH_BOX(&memory_scan_backward));
}

#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) {
  m.impl("memory_scan", TORCH_BOX(&memory_scan));
  m.impl("memory_scan_backward", TORCH_BOX(&memory_scan_backward));
}
#endif
