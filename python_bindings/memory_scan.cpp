// torch.ops.dan_fast.memory_scan and its backward: checks, output tensors and scan.h's structs for every device.
#include "../csrc/memory/scan/scan.h"

#include <initializer_list>
#include <vector>

#include "dispatch.h"

namespace {

using namespace dan_fast;
using TensorList = std::vector<Tensor>;

// The arguments of memory_scan, in the order of its schema.
struct ScanCall {
  Tensor scores, unlabeled_scores, gram, gates, labels, sample_ids;
  TensorList labeled, unlabeled;
  double decay, decay_unlabeled;
  bool scalar_keys;

  using Types = Joined<Tensors<6>, std::tuple<TensorList, TensorList, double, double, bool>>;
};

struct ScanBackwardCall {
  Tensor grad_loss;
  ScanCall forward;
  TensorList outputs;

  using Types = Joined<Tensors<1>, ScanCall::Types, std::tuple<TensorList>>;
};

// A memory before the batch: what `labeled` and `unlabeled` hold, in their order.
struct BeforeTensors {
  Tensor square_norms, usage, evaluation, labels, sample_ids, least_used;

  template <typename T>
  MemoryBefore<T> pointers() const {
    return {labels.size(0),
            data<const T>(square_norms),
            data<const T>(usage),
            data<const T>(evaluation),
            data<const int64_t>(labels),
            data<const int64_t>(sample_ids),
            data<const int64_t>(least_used)};
  }
};

struct AfterTensors {
  Tensor square_norms, usage, evaluation, kept, held, labels, sample_ids, least_used;

  template <typename T>
  MemoryAfter<T> pointers() const {
    return {data<T>(square_norms), data<T>(usage), data<T>(evaluation), data<T>(kept), data<T>(held),
            data<int64_t>(labels), data<int64_t>(sample_ids), data<int64_t>(least_used)};
  }
};

struct RecordTensors {
  Tensor before, weights, evaluation, square_norms, events;

  template <typename T>
  WriteRecord<T> pointers() const {
    return {data<T>(before), data<T>(weights), data<T>(evaluation), data<T>(square_norms), data<uint8_t>(events)};
  }
};

// The arguments, checked and contiguous.
struct Arguments {
  explicit Arguments(const ScanCall& x)
      : dtype(x.scores.scalar_type()), decay(x.decay), decay_unlabeled(x.decay_unlabeled), scalar_keys(x.scalar_keys) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "scores must be float32 or float64");
    STD_TORCH_CHECK(x.labels.dim() == 1, "labels must be (B,), got ", x.labels.dim(), " dimensions");
    STD_TORCH_CHECK(x.sample_ids.dim() == 1, "sample_ids must be (B',), got ", x.sample_ids.dim(), " dimensions");
    STD_TORCH_CHECK(x.scores.dim() == 2, "scores must be (B + B', s1), got ", x.scores.dim(), " dimensions");
    STD_TORCH_CHECK(x.unlabeled_scores.dim() == 2, "unlabeled_scores must be (B', s2), got ", x.unlabeled_scores.dim(),
                    " dimensions");
    batch = x.labels.size(0);
    unlabeled_batch = x.sample_ids.size(0);
    rows = batch + unlabeled_batch;
    slots = x.scores.size(1);
    unlabeled_slots = x.unlabeled_scores.size(1);
    scores = x.scores;
    scores = fit("scores", x.scores, "(B + B', s1)", {rows, slots}, dtype);
    unlabeled_scores =
        fit("unlabeled_scores", x.unlabeled_scores, "(B', s2)", {unlabeled_batch, unlabeled_slots}, dtype);
    gram = fit("gram", x.gram, "(B + B', B + B')", {rows, rows}, dtype);
    gates = fit("gates", x.gates, "(3,)", {3}, dtype);
    labels = fit("labels", x.labels, "(B,)", {batch}, ScalarType::Long);
    sample_ids = fit("sample_ids", x.sample_ids, "(B',)", {unlabeled_batch}, ScalarType::Long);
    labeled = memory("labeled", x.labeled, slots);
    unlabeled = memory("unlabeled", x.unlabeled, unlabeled_slots);
  }

  Tensor fit(const char* name, const Tensor& tensor, const char* shape, Sizes sizes, ScalarType type) const {
    return checked(name, tensor, shape, sizes, type, scores, "scores");
  }

  BeforeTensors memory(const char* name, const TensorList& given, int64_t size) const {
    STD_TORCH_CHECK(given.size() == 6, name,
                    " must hold 6 tensors: square_norms, usage, evaluation, labels, sample_ids, least_used");
    STD_TORCH_CHECK(size >= 1, name, " has no slot");
    BeforeTensors m{given[0], given[1], given[2], given[3], given[4], given[5]};
    m.square_norms = fit("square_norms", m.square_norms, "(s,)", {size}, dtype);
    m.usage = fit("usage", m.usage, "(s,)", {size}, dtype);
    m.evaluation = fit("evaluation", m.evaluation, "(s,)", {size}, dtype);
    m.labels = fit("labels", m.labels, "(s,)", {size}, ScalarType::Long);
    m.sample_ids = fit("sample_ids", m.sample_ids, "(s,)", {size}, ScalarType::Long);
    m.least_used = fit("least_used", m.least_used, "()", {}, ScalarType::Long);
    return m;
  }

  Tensor empty(Sizes sizes, ScalarType type) const { return torch::stable::new_empty(scores, sizes, type); }

  template <typename T>
  ScanInput<T> pointers() const {
    return {batch,
            unlabeled_batch,
            data<const T>(scores),
            data<const T>(unlabeled_scores),
            data<const T>(gram),
            data<const T>(gates),
            data<const int64_t>(labels),
            data<const int64_t>(sample_ids),
            labeled.pointers<T>(),
            unlabeled.pointers<T>(),
            static_cast<T>(decay),
            static_cast<T>(decay_unlabeled),
            scalar_keys};
  }

  const ScalarType dtype;
  const double decay, decay_unlabeled;
  const bool scalar_keys;
  int64_t batch, unlabeled_batch, rows, slots, unlabeled_slots;
  Tensor scores, unlabeled_scores, gram, gates, labels, sample_ids;
  BeforeTensors labeled, unlabeled;
};

// What memory_scan returns, in this order.
struct Results {
  Tensor loss, pseudo_labels, fault;
  AfterTensors labeled, unlabeled;
  RecordTensors labeled_record, unlabeled_record;
  Tensor retrieval_scores, retrieval_sums, false_sums;

  // each(tensor, sizes, dtype) for all of them, in their order.
  template <typename Each>
  void visit(const Arguments& args, const Each& each) {
    const ScalarType real = args.dtype, whole = ScalarType::Long;
    const int64_t queries = args.unlabeled_batch;
    const auto after = [&](AfterTensors& m, int64_t steps, int64_t slots) {
      for (Tensor* tensor : {&m.square_norms, &m.usage, &m.evaluation, &m.kept}) each(*tensor, {slots}, real);
      each(m.held, {steps, slots}, real);
      for (Tensor* tensor : {&m.labels, &m.sample_ids}) each(*tensor, {slots}, whole);
      each(m.least_used, {}, whole);
    };
    const auto record = [&](RecordTensors& m, int64_t steps, int64_t slots) {
      for (Tensor* tensor : {&m.before, &m.weights, &m.evaluation, &m.square_norms}) {
        each(*tensor, {steps, slots}, real);
      }
      each(m.events, {steps, slots}, ScalarType::Byte);
    };
    each(loss, {}, real);
    each(pseudo_labels, {queries}, whole);
    each(fault, {}, ScalarType::Int);
    after(labeled, args.batch, args.slots);
    after(unlabeled, queries, args.unlabeled_slots);
    record(labeled_record, args.batch, args.slots);
    record(unlabeled_record, queries, args.unlabeled_slots);
    each(retrieval_scores, {queries, args.slots}, real);
    each(retrieval_sums, {queries, 4}, real);
    each(false_sums, {queries, 2}, real);
  }

  template <typename T>
  ScanOutput<T> pointers() const {
    return {data<T>(loss),
            data<int64_t>(pseudo_labels),
            data<int32_t>(fault),
            labeled.pointers<T>(),
            unlabeled.pointers<T>(),
            labeled_record.pointers<T>(),
            unlabeled_record.pointers<T>(),
            data<T>(retrieval_scores),
            data<T>(retrieval_sums),
            data<T>(false_sums)};
  }
};

void on_threads(int64_t count, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(
      0, count, grain, [=](int64_t first, int64_t last) { task(context, first, last); });
}

// launch(workspace) where it takes one; a CUDA error code.
template <typename T, typename Launch>
int with_workspace(const Arguments& args, const ScanInput<T>& in, const Launch& launch) {
  int64_t bytes = 0;
  const int status = scan_workspace_bytes(in, &bytes);
  return status != 0 ? status : launch(args.empty({bytes}, ScalarType::Byte).mutable_data_ptr());
}

TensorList memory_scan(const ScanCall& call) {
  const Arguments args(call);
  Results results;
  TensorList list;
  results.visit(args, [&](Tensor& tensor, Sizes sizes, ScalarType dtype) {
    tensor = args.empty(sizes, dtype);
    list.push_back(tensor);
  });
  for_real(args.scores, [&](auto zero) {
    using T = decltype(zero);
    const auto in = args.pointers<T>();
    const auto out = results.pointers<T>();
    on_device_of(
        args.scores, "memory_scan", [&] { DAN_FAST_KERNEL(scan_forward<T>)(in, out, on_threads); },
        [&](auto stream) {
          return with_workspace(args, in, [&](void* memory) { return launch_scan_forward(in, out, memory, stream); });
        });
  });
  return list;
}

Tensors<4> memory_scan_backward(const ScanBackwardCall& call) {
  const Arguments args(call.forward);
  const Tensor grad_loss = args.fit("grad_loss", call.grad_loss, "()", {}, args.dtype);
  Results results;
  size_t count = 0;
  bool same = true;
  results.visit(args, [&](Tensor& tensor, Sizes sizes, ScalarType dtype) {
    same = same && count < call.outputs.size();
    if (!same) return;
    tensor = call.outputs[count++];
    same = has_sizes(tensor, sizes) && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
           on_one_device(tensor, args.scores);
  });
  STD_TORCH_CHECK(same && count == call.outputs.size(),
                  "outputs must be what memory_scan returned for the same arguments");
  const Tensor grad_scores = args.empty({args.rows, args.slots}, args.dtype);
  const Tensor grad_unlabeled_scores = args.empty({args.unlabeled_batch, args.unlabeled_slots}, args.dtype);
  const Tensor grad_gram = args.empty({args.rows, args.rows}, args.dtype), grad_gates = args.empty({3}, args.dtype);
  for_real(args.scores, [&](auto zero) {
    using T = decltype(zero);
    const auto in = args.pointers<T>();
    const auto out = results.pointers<T>();
    const ScanGradient<T> grad = {data<const T>(grad_loss), data<T>(grad_scores), data<T>(grad_unlabeled_scores),
                                  data<T>(grad_gram), data<T>(grad_gates)};
    on_device_of(
        args.scores, "memory_scan_backward", [&] { DAN_FAST_KERNEL(scan_backward<T>)(in, out, grad, on_threads); },
        [&](auto stream) {
          return with_workspace(
              args, in, [&](void* memory) { return launch_scan_backward(in, out, grad, memory, stream); });
        });
  });
  return {grad_scores, grad_unlabeled_scores, grad_gram, grad_gates};
}

template <typename Library>
void implement(Library& m) {
  m.impl("memory_scan", DAN_FAST_BOX(ScanCall, memory_scan));
  m.impl("memory_scan_backward", DAN_FAST_BOX(ScanBackwardCall, memory_scan_backward));
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

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) { implement(m); }
#ifdef DAN_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dan_fast, CUDA, m) { implement(m); }
#endif
