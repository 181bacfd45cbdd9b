// The CUDA scan on host threads. As a library: two functions for each type, over arrays that the caller owns. As a
// program (compiled with -DSCAN_ON_HOST_MAIN=float or double): random batches, each forward and backward twice, under
// the sanitizers; it fails if a bit differs.
//
// usage: scan_on_host BLOCKS THREADS [short | racy]     with one output too small, or a barrier that orders nothing
#include "../cuda_on_host.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "../../../csrc/memory/scan/scan_cuda_backward.cuh"
#include "../../../csrc/memory/scan/scan_cuda_forward.cuh"

using namespace dan_fast;

namespace {

// Takes pointers one after the other.
class Arrays {
 public:
  explicit Arrays(void* const* pointers) : next_(pointers) {}
  template <typename T>
  void take(T*& pointer) {
    pointer = static_cast<T*>(*next_++);
  }

 private:
  void* const* next_;
};

template <typename T>
MemoryBefore<T> take_before(Arrays& arrays, int64_t slots) {
  MemoryBefore<T> memory = {};
  memory.slots = slots;
  const T** const floats[] = {&memory.square_norms, &memory.usage, &memory.evaluation};
  for (const T** pointer : floats) arrays.take(*pointer);
  const int64_t** const integers[] = {&memory.labels, &memory.sample_ids, &memory.least_used};
  for (const int64_t** pointer : integers) arrays.take(*pointer);
  return memory;
}

template <typename T>
MemoryAfter<T> take_after(Arrays& arrays) {
  MemoryAfter<T> memory = {};
  T** const floats[] = {&memory.square_norms, &memory.usage, &memory.evaluation, &memory.kept, &memory.held};
  for (T** pointer : floats) arrays.take(*pointer);
  int64_t** const integers[] = {&memory.labels, &memory.sample_ids, &memory.least_used};
  for (int64_t** pointer : integers) arrays.take(*pointer);
  return memory;
}

template <typename T>
WriteRecord<T> take_record(Arrays& arrays) {
  WriteRecord<T> record = {};
  T** const floats[] = {&record.before, &record.weights, &record.evaluation, &record.square_norms};
  for (T** pointer : floats) arrays.take(*pointer);
  arrays.take(record.events);
  return record;
}

template <typename T>
struct Problem {
  ScanInput<T> in;
  ScanOutput<T> out;
  ScanGradient<T> gradient;
};

// sizes: B, B', s1, s2, whether d = 1. Arrays in the order of scan.h: input, output, gradient.
template <typename T>
Problem<T> problem_of(const int64_t* sizes, const double* decays, void* const* pointers) {
  Problem<T> p = {};
  Arrays arrays(pointers);
  p.in.batch = sizes[0];
  p.in.unlabeled_batch = sizes[1];
  p.in.scalar_keys = sizes[4] != 0;
  p.in.decay = static_cast<T>(decays[0]);
  p.in.decay_unlabeled = static_cast<T>(decays[1]);
  for (const T** pointer : {&p.in.scores, &p.in.unlabeled_scores, &p.in.gram, &p.in.gates}) arrays.take(*pointer);
  for (const int64_t** pointer : {&p.in.labels, &p.in.sample_ids}) arrays.take(*pointer);
  p.in.labeled = take_before<T>(arrays, sizes[2]);
  p.in.unlabeled = take_before<T>(arrays, sizes[3]);
  arrays.take(p.out.loss);
  arrays.take(p.out.pseudo_labels);
  arrays.take(p.out.fault);
  p.out.labeled = take_after<T>(arrays);
  p.out.unlabeled = take_after<T>(arrays);
  p.out.labeled_record = take_record<T>(arrays);
  p.out.unlabeled_record = take_record<T>(arrays);
  for (T** pointer : {&p.out.retrieval_scores, &p.out.retrieval_sums, &p.out.false_sums}) arrays.take(*pointer);
  arrays.take(p.gradient.loss);
  for (T** pointer : {&p.gradient.scores, &p.gradient.unlabeled_scores, &p.gradient.gram, &p.gradient.gates}) {
    arrays.take(*pointer);
  }
  return p;
}

// A workspace whose bytes are NaN wherever it is not cleared, with its exact size so that a sanitizer sees its end.
template <typename T>
class Workspace {
 public:
  Workspace(const Problem<T>& p, unsigned blocks, bool backward) {
    const int64_t bytes = layout_.lay_out(nullptr, p.in, blocks, backward);
    memory_.reset(static_cast<char*>(std::aligned_alloc(256, static_cast<size_t>(bytes))));
    std::memset(memory_.get(), 0xff, static_cast<size_t>(bytes));
    layout_.lay_out(memory_.get(), p.in, blocks, backward);
    std::memset(layout_.arrived, 0, kClearedBytes);
  }
  const ScanWorkspace<T>& layout() const { return layout_; }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  ScanWorkspace<T> layout_;
};

template <typename T>
void forward(const Problem<T>& p, unsigned blocks, unsigned threads) {
  const Workspace<T> workspace(p, blocks, false);
  std::vector<ForwardShared<T>> shared(blocks);
  on_host::launch_cooperative(blocks, threads, [&] {
    ForwardScan<T>(p.in, p.out, workspace.layout(), shared[blockIdx.x]).run();
  });
}

template <typename T>
void backward(const Problem<T>& p, unsigned blocks, unsigned threads) {
  const Workspace<T> workspace(p, blocks, true);
  std::vector<BackwardShared<T>> shared(blocks);
  on_host::launch_cooperative(blocks, threads, [&] {
    BackwardScan<T>(p.in, p.out, p.gradient, workspace.layout(), shared[blockIdx.x]).run();
  });
}

}  // namespace

#ifndef SCAN_ON_HOST_MAIN

#define DEFINE_ENTRIES(T)                                                                                      \
  extern "C" void scan_forward_##T(                                                                            \
      const int64_t* sizes, const double* decays, void* const* arrays, unsigned blocks, unsigned threads) {    \
    forward(problem_of<T>(sizes, decays, arrays), blocks, threads);                                            \
  }                                                                                                            \
  extern "C" void scan_backward_##T(                                                                           \
      const int64_t* sizes, const double* decays, void* const* arrays, unsigned blocks, unsigned threads) {    \
    backward(problem_of<T>(sizes, decays, arrays), blocks, threads);                                           \
  }
DEFINE_ENTRIES(float)
DEFINE_ENTRIES(double)

#else

namespace {

// The arrays of one random batch, each of its exact size.
template <typename T>
class RandomBatch {
 public:
  RandomBatch(
      unsigned seed, int64_t batch, int64_t unlabeled_batch, int64_t slots, int64_t unlabeled_slots, bool is_short)
      : random_(seed), sizes_{batch, unlabeled_batch, slots, unlabeled_slots, 0} {
    constexpr int64_t kKeyDim = 3;
    const int64_t rows = batch + unlabeled_batch;
    const std::vector<T> keys = normal(rows * kKeyDim);
    const std::vector<T> memory = normal(slots * kKeyDim), unlabeled_memory = normal(unlabeled_slots * kKeyDim);
    const T* const unlabeled_keys = keys.data() + batch * kKeyDim;
    add(products(keys.data(), rows, memory.data(), slots, kKeyDim));
    add(products(unlabeled_keys, unlabeled_batch, unlabeled_memory.data(), unlabeled_slots, kKeyDim));
    add(products(keys.data(), rows, keys.data(), rows, kKeyDim));
    add(std::vector<T>{T(0.3), T(-0.2), T(0.6)});
    add(below(batch, 3, 0));
    add(below(unlabeled_batch, 100, 0));
    add_memory(memory, slots, kKeyDim);
    add_memory(unlabeled_memory, unlabeled_slots, kKeyDim);
    first_out_ = arrays_.size();
    add_nan(1);
    add_out<int64_t>(unlabeled_batch);
    add_out<int32_t>(1);
    for (const auto& [steps, s] : {std::pair(batch, slots), std::pair(unlabeled_batch, unlabeled_slots)}) {
      for (const int64_t size : {s, s, s, s, steps * s}) add_nan(size);
      for (const int64_t size : {s, s, int64_t{1}}) add_out<int64_t>(size);
    }
    for (const auto& [steps, s] : {std::pair(batch, slots), std::pair(unlabeled_batch, unlabeled_slots)}) {
      for (int k = 0; k < 4; ++k) add_nan(steps * s);
      add_out<uint8_t>(steps * s);
    }
    for (const int64_t size : {unlabeled_batch * slots, 4 * unlabeled_batch, 2 * unlabeled_batch}) add_nan(size);
    add(std::vector<T>{T(1)});
    for (const int64_t size : {rows * slots, unlabeled_batch * unlabeled_slots, rows * rows, int64_t{3}}) add_nan(size);
    if (is_short) {
      std::vector<char>& first_norms = arrays_[first_out_ + 3];
      first_norms.resize(first_norms.size() - sizeof(T));
      first_norms.shrink_to_fit();
    }
  }

  std::vector<std::vector<char>> run(unsigned blocks, unsigned threads) {
    std::vector<void*> pointers;
    for (auto& array : arrays_) pointers.push_back(array.data());
    const double decays[] = {0.99, 0.9};
    const Problem<T> p = problem_of<T>(sizes_, decays, pointers.data());
    forward(p, blocks, threads);
    backward(p, blocks, threads);
    return {arrays_.begin() + static_cast<std::ptrdiff_t>(first_out_), arrays_.end()};
  }

 private:
  std::vector<T> normal(int64_t size) {
    std::normal_distribution<double> distribution;
    std::vector<T> values(static_cast<size_t>(size));
    for (T& value : values) value = static_cast<T>(distribution(random_));
    return values;
  }
  std::vector<int64_t> below(int64_t size, int64_t end, int64_t first) {
    std::uniform_int_distribution<int64_t> distribution(first, end - 1);
    std::vector<int64_t> values(static_cast<size_t>(size));
    for (int64_t& value : values) value = distribution(random_);
    return values;
  }
  static std::vector<T> products(const T* left, int64_t rows, const T* right, int64_t columns, int64_t depth) {
    std::vector<T> result(static_cast<size_t>(rows * columns));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t k = 0; k < depth; ++k) result[r * columns + c] += left[r * depth + k] * right[c * depth + k];
      }
    }
    return result;
  }
  void add_memory(const std::vector<T>& rows, int64_t slots, int64_t depth) {
    std::vector<T> squares(static_cast<size_t>(slots)), shares(static_cast<size_t>(slots), T(1) / T(slots));
    for (int64_t i = 0; i < slots; ++i) squares[i] = products(&rows[i * depth], 1, &rows[i * depth], 1, depth)[0];
    std::vector<T> usage = normal(slots);
    for (T& value : usage) value = std::abs(value);
    add(squares);
    add(usage);
    add(shares);
    add(below(slots, 3, -1));
    add(below(slots, 100, 0));
    add(below(1, slots, 0));
  }
  template <typename V>
  void add(const std::vector<V>& values) {
    arrays_.emplace_back(values.size() * sizeof(V));
    if (!values.empty()) std::memcpy(arrays_.back().data(), values.data(), arrays_.back().size());
  }
  template <typename V>
  void add_out(int64_t size) {
    add(std::vector<V>(static_cast<size_t>(size), static_cast<V>(77)));
  }
  void add_nan(int64_t size) { add(std::vector<T>(static_cast<size_t>(size), T(NAN))); }

  std::mt19937 random_;
  int64_t sizes_[5];
  std::vector<std::vector<char>> arrays_;
  size_t first_out_ = 0;
};

bool same_bits_twice(unsigned blocks, unsigned threads, bool is_short) {
  using T = SCAN_ON_HOST_MAIN;
  const int64_t sizes[][4] = {{2, 3, 40, 150}, {0, 1, 20, 9}};
  for (const auto& s : sizes) {
    RandomBatch<T> first(1, s[0], s[1], s[2], s[3], is_short), second(1, s[0], s[1], s[2], s[3], is_short);
    if (first.run(blocks, threads) != second.run(blocks, threads)) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const unsigned blocks = static_cast<unsigned>(std::atoi(argv[1]));
  const unsigned threads = static_cast<unsigned>(std::atoi(argv[2]));
  const std::string fault = argc > 3 ? argv[3] : "";
  on_host::barrier_is_broken = fault == "racy";
  if (!same_bits_twice(blocks, threads, fault == "short")) {
    std::puts("two runs differ");
    return 1;
  }
  std::puts("ok");
  return 0;
}

#endif
