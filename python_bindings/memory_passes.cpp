// torch.ops.dan_fast on the CPU: one pass over a memory, and which instruction set it takes. Tensors are checked and
// laid out here; csrc/memory/passes/stream.h says what is computed.
#include "../csrc/memory/passes/stream.h"

#include <algorithm>
#include <memory>

#include "dispatch.h"

namespace {

using namespace dan_fast;

// A task of fewer multiplications costs less than waking a thread.
constexpr int64_t kProductsPerTask = 1 << 19;

std::string instruction_set() { return isa_name(); }

void check_base(const Tensor& base) {
  STD_TORCH_CHECK(base.dim() == 2, "base must be (s, d), got ", base.dim(), " dimensions");
  check_storage("base", base);
}

// `size` is -1 where any will do; `with` says what the second one has to fit.
void check_matrix(const char* name, const Tensor& matrix, int64_t rows, int64_t columns, const char* shape) {
  STD_TORCH_CHECK(matrix.is_cpu(), name, " must be on the CPU, as base is");
  STD_TORCH_CHECK(matrix.dim() == 2, name, " must be ", shape, ", got ", matrix.dim(), " dimensions");
  STD_TORCH_CHECK((rows < 0 || matrix.size(0) == rows) && matrix.size(1) == columns, name, " must be ", shape, " = (",
                  rows < 0 ? "any" : std::to_string(rows), ", ", columns, "), got (", matrix.size(0), ", ",
                  matrix.size(1), ")");
}

void check_statistics(const char* name, const Tensor& tensor, const Tensor& base) {
  const bool wide = statistics_of(base) == ScalarType::Double;
  STD_TORCH_CHECK(tensor.scalar_type() == statistics_of(base), name, " must be ", wide ? "float64" : "float32",
                  ", the type of statistics of base");
}

void check_keys(const Tensor& keys, const Tensor& base) {
  check_matrix("keys", keys, -1, base.size(1), "(T, d)");
  check_statistics("keys", keys, base);
}

void check_pending(const Tensor& base, const Tensor& kept, const Tensor& weights, const Tensor& pending_keys) {
  STD_TORCH_CHECK(kept.is_cpu(), "kept must be on the CPU, as base is");
  STD_TORCH_CHECK(kept.dim() == 1 && kept.size(0) == base.size(0), "kept must be (s,) = (", base.size(0), ",)");
  check_statistics("kept", kept, base);
  check_matrix("weights", weights, -1, base.size(0), "(U, s)");
  check_statistics("weights", weights, base);
  check_matrix("pending_keys", pending_keys, weights.size(0), base.size(1), "(U, d)");
  const ScalarType type = pending_keys.scalar_type();
  STD_TORCH_CHECK(type == base.scalar_type() || type == statistics_of(base),
                  "pending_keys must have the dtype of base or of its statistics");
}

template <typename A>
std::unique_ptr<A[]> packed_keys(const Tensor& keys) {
  const int64_t rows = keys.size(0), columns = keys.size(1);
  std::unique_ptr<A[]> packed(new A[DAN_FAST_KERNEL(packed_rows_size<A>)(rows, columns)]);
  DAN_FAST_KERNEL(pack_rows<A, A>)(data<const A>(keys), keys.stride(0), rows, columns, packed.get());
  return packed;
}

template <typename S, typename A>
std::unique_ptr<A[]> packed_pending(const Tensor& keys, bool in_storage_type) {
  const int64_t rows = keys.size(0), columns = keys.size(1);
  std::unique_ptr<A[]> packed(new A[DAN_FAST_KERNEL(packed_columns_size<A>)(rows, columns)]);
  if (in_storage_type) {
    DAN_FAST_KERNEL(pack_columns<S, A>)(data<const S>(keys), keys.stride(0), rows, columns, packed.get());
  } else {
    DAN_FAST_KERNEL(pack_columns<A, A>)(data<const A>(keys), keys.stride(0), rows, columns, packed.get());
  }
  return packed;
}

// `like` is a tensor of the pass.
template <typename S, typename A>
void run(const StreamPass<S, A>& pass, const Tensor& like) {
  const auto kernel = DAN_FAST_KERNEL(stream_rows<S, A>);
  const int64_t products = std::max<int64_t>(1, pass.columns) * (pass.queries + pass.pending + 4);
  const int64_t grain = std::max<int64_t>(1, kProductsPerTask / products);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks = std::clamp<int64_t>((pass.slots + grain - 1) / grain, 1, threads);
  const int64_t rows = (pass.slots + tasks - 1) / tasks;
  // For all tasks before any of them changes a memory: there may not be so much left.
  const int64_t size = DAN_FAST_KERNEL(stream_scratch_size<S, A>)(pass);
  const Tensor scratch = torch::stable::new_empty(like, {tasks, size}, statistics_of(like));
  A* const numbers = data<A>(scratch);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      kernel(pass, std::min(task * rows, pass.slots), std::min((task + 1) * rows, pass.slots), numbers + task * size);
    }
  });
}

Tensors<2> memory_scores(const Tensor& keys, const Tensor& base) {
  check_base(base);
  check_keys(keys, base);
  const Tensor rows = with_adjacent_columns(base), queries = with_adjacent_columns(keys);
  const ScalarType statistics = statistics_of(base);
  const Tensor scores = torch::stable::new_empty(base, {keys.size(0), base.size(0)}, statistics);
  const Tensor square_norms = torch::stable::new_empty(base, {base.size(0)}, statistics);
  for_storage(base, [&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto packed = packed_keys<A>(queries);
    StreamPass<S, A> pass = {};
    pass.slots = rows.size(0);
    pass.columns = rows.size(1);
    pass.base = data<const S>(rows);
    pass.row_stride = rows.stride(0);
    pass.packed_keys = packed.get();
    pass.queries = queries.size(0);
    pass.scores = data<A>(scores);
    pass.square_norms = data<A>(square_norms);
    run(pass, base);
  });
  return {scores, square_norms};
}

Tensor memory_combine(const Tensor& weights, const Tensor& base) {
  check_base(base);
  check_matrix("weights", weights, -1, base.size(0), "(T, s)");
  check_statistics("weights", weights, base);
  const Tensor rows = with_adjacent_columns(base), shares = torch::stable::contiguous(weights);
  const int64_t queries = shares.size(0), slots = rows.size(0), columns = rows.size(1);
  const Tensor out = torch::stable::new_empty(base, {queries, columns}, statistics_of(base));
  for_storage(base, [&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    const auto kernel = DAN_FAST_KERNEL(combine_columns<S, A>);
    const int64_t width = DAN_FAST_KERNEL(combine_width<A>)();
    const A* weights_data = data<const A>(shares);
    const S* base_data = data<const S>(rows);
    const int64_t row_stride = rows.stride(0);
    A* to = data<A>(out);
    const int64_t grain = std::max<int64_t>(1, kProductsPerTask / (width * (queries + 1) * (slots + 1)));
    torch::stable::parallel_for(0, (columns + width - 1) / width, grain, [=](int64_t first, int64_t last) {
      kernel(weights_data, queries, base_data, row_stride, slots, columns, first * width,
             std::min(columns, last * width), to);
    });
  });
  return out;
}

// `stored` takes the new rows: `base` itself or another tensor.
void commit(const Tensor& base, const Tensor& kept, const Tensor& weights, const Tensor& pending_keys,
            const Tensor* keys, const Tensor& stored, const Tensor* scores, const Tensor& square_norms) {
  const Tensor all_kept = torch::stable::contiguous(kept), shares = torch::stable::contiguous(weights);
  const Tensor pending = with_adjacent_columns(pending_keys);
  for_storage(base, [&](auto storage, auto zero) {
    using S = decltype(storage);
    using A = decltype(zero);
    StreamPass<S, A> pass = {};
    pass.slots = base.size(0);
    pass.columns = base.size(1);
    pass.base = data<const S>(base);
    pass.row_stride = base.stride(0);
    pass.stored = data<S>(stored);
    pass.stored_stride = stored.stride(0);
    pass.kept = data<const A>(all_kept);
    pass.weights = data<const A>(shares);
    pass.pending = shares.size(0);
    const auto columns = packed_pending<S, A>(pending, pending.scalar_type() == base.scalar_type());
    pass.packed_pending = columns.get();
    std::unique_ptr<A[]> rows;
    if (keys != nullptr) {
      rows = packed_keys<A>(with_adjacent_columns(*keys));
      pass.packed_keys = rows.get();
      pass.queries = keys->size(0);
      pass.scores = data<A>(*scores);
    }
    pass.square_norms = data<A>(square_norms);
    run(pass, base);
  });
}

Tensors<2> memory_commit(const Tensor& base, const Tensor& kept, const Tensor& weights,
                                         const Tensor& pending_keys) {
  check_base(base);
  check_pending(base, kept, weights, pending_keys);
  const Tensor stored = torch::stable::new_empty(base, {base.size(0), base.size(1)});
  const Tensor square_norms = torch::stable::new_empty(base, {base.size(0)}, statistics_of(base));
  commit(with_adjacent_columns(base), kept, weights, pending_keys, nullptr, stored, nullptr, square_norms);
  return {stored, square_norms};
}

Tensors<2> memory_commit_scores_(const Tensor& base, const Tensor& kept, const Tensor& weights,
                                                 const Tensor& pending_keys, const Tensor& keys) {
  check_base(base);
  check_pending(base, kept, weights, pending_keys);
  check_keys(keys, base);
  const bool adjacent = base.stride(1) == 1 || base.size(1) <= 1;
  const bool apart = base.stride(0) >= base.size(1) || base.size(0) <= 1;
  STD_TORCH_CHECK(adjacent && apart,
                  "base must have adjacent columns and rows that do not overlap to be changed in place; make it "
                  "contiguous first");
  const ScalarType statistics = statistics_of(base);
  const Tensor scores = torch::stable::new_empty(base, {keys.size(0), base.size(0)}, statistics);
  const Tensor square_norms = torch::stable::new_empty(base, {base.size(0)}, statistics);
  commit(base, kept, weights, pending_keys, &keys, base, &scores, square_norms);
  return {scores, square_norms};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dan_fast, m) {
  m.def("instruction_set() -> str");
  m.def("memory_scores(Tensor keys, Tensor base) -> (Tensor scores, Tensor square_norms)");
  m.def("memory_combine(Tensor weights, Tensor base) -> Tensor");
  m.def(
      "memory_commit(Tensor base, Tensor kept, Tensor weights, Tensor pending_keys) -> (Tensor base, Tensor "
      "square_norms)");
  m.def(
      "memory_commit_scores_(Tensor(a!) base, Tensor kept, Tensor weights, Tensor pending_keys, Tensor keys) -> "
      "(Tensor scores, Tensor square_norms)");
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CPU, m) {
  m.impl("memory_scores", TORCH_BOX(&memory_scores));
  m.impl("memory_combine", TORCH_BOX(&memory_combine));
  m.impl("memory_commit", TORCH_BOX(&memory_commit));
  m.impl("memory_commit_scores_", TORCH_BOX(&memory_commit_scores_));
}
