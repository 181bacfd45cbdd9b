// What both directions of the CPU scan walk the slots with: chunks, sums in a fixed order, products with a few rows.
// For `*_isa.cpp` files. Partial sums are 64 bytes wide, in one register or in several, so that sums have the same
// order, and the same bits, on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "../cpu/isa.h"
#include "scan_cpu.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Slots a piece of work: its temporaries stay in the first cache. Sums are made per chunk, then over chunks in order.
constexpr int64_t kChunk = 512;
// Below 16384 slots a task costs less than waking a thread.
constexpr int64_t kGrain = 16384 / kChunk;

struct Chunk {
  int64_t index, begin, size;
};

inline int64_t chunks_of(int64_t slots) { return (slots + kChunk - 1) / kChunk; }

// body(Chunk) for all chunks of [0, slots).
template <typename Body>
void for_chunks(int64_t slots, ParallelFor parallel, const Body& body) {
  struct Work {
    const Body& body;
    int64_t slots;
  } work = {body, slots};
  const auto task = [](void* context, int64_t first, int64_t last) {
    const Work& work = *static_cast<const Work*>(context);
    for (int64_t index = first; index < last; ++index) {
      const int64_t begin = index * kChunk, left = work.slots - begin;
      work.body(Chunk{index, begin, left < kChunk ? left : kChunk});
    }
  };
  const int64_t chunks = chunks_of(slots);
  if (chunks <= kGrain) {
    task(&work, 0, chunks);
  } else {
    parallel(chunks, kGrain, task, &work);
  }
}

// Uninitialised memory. Not std::vector, whose code the linker shares among instruction sets.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(bytes(size), kAlign))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, kAlign); }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  static size_t bytes(int64_t size) { return static_cast<size_t>(size < 1 ? 1 : size) * sizeof(T); }
  T* data_;
};

template <typename T>
void copy(const T* from, int64_t size, T* to) {
  std::memcpy(to, from, static_cast<size_t>(size) * sizeof(T));
}

template <typename T>
void fill(T* to, int64_t size, T value) {
  for (int64_t i = 0; i < size; ++i) to[i] = value;
}

// A register of the instruction set.
template <typename T>
struct Vector {
#if defined(__AVX512F__)
  static constexpr int64_t kBytes = 64;
#elif defined(__AVX__)
  static constexpr int64_t kBytes = 32;
#else
  static constexpr int64_t kBytes = 16;
#endif
  typedef T Type __attribute__((vector_size(kBytes)));
  typedef T Anywhere __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
  static constexpr int64_t kWidth = kBytes / sizeof(T);

  static void load(const T* from, Type& to) { to = *reinterpret_cast<const Anywhere*>(from); }
  static void store(const Type& from, T* to) { *reinterpret_cast<Anywhere*>(to) = from; }
};

// Partial sums: 64 bytes of them, in as many registers as that takes.
template <typename T>
struct Lanes {
  static constexpr int64_t kWidth = 64 / sizeof(T);
  static constexpr int kParts = 64 / Vector<T>::kBytes;
  typename Vector<T>::Type part[kParts];

  void load(const T* from) {
    for (int p = 0; p < kParts; ++p) Vector<T>::load(from + p * Vector<T>::kWidth, part[p]);
  }
  // The first `count` lanes; zeros in the rest.
  void load_some(const T* from, int64_t count) {
    T lanes[kWidth] = {};
    for (int64_t k = 0; k < count; ++k) lanes[k] = from[k];
    load(lanes);
  }
};

template <typename T>
inline double sum_of(const Lanes<T>& partial) {
  T lanes[Lanes<T>::kWidth];
  for (int p = 0; p < Lanes<T>::kParts; ++p) Vector<T>::store(partial.part[p], lanes + p * Vector<T>::kWidth);
  int64_t half = Lanes<T>::kWidth / 2;
  double sums[Lanes<T>::kWidth / 2];
  for (int64_t k = 0; k < half; ++k) sums[k] = static_cast<double>(lanes[k]) + static_cast<double>(lanes[k + half]);
  for (half /= 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

template <typename T>
double sum(const T* x, int64_t size) {
  constexpr int64_t kWidth = Lanes<T>::kWidth;
  constexpr int kParts = Lanes<T>::kParts;
  Lanes<T> sums[2] = {}, v;
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
    for (int k = 0; k < 2; ++k) {
      v.load(x + i + k * kWidth);
      for (int p = 0; p < kParts; ++p) sums[k].part[p] += v.part[p];
    }
  }
  for (int k = 0; i < size; i += kWidth, ++k) {
    v.load_some(x + i, size - i < kWidth ? size - i : kWidth);
    for (int p = 0; p < kParts; ++p) sums[k].part[p] += v.part[p];
  }
  for (int p = 0; p < kParts; ++p) sums[0].part[p] += sums[1].part[p];
  return sum_of(sums[0]);
}

// The smallest of `size` >= 1 numbers.
template <typename T>
T least(const T* x, int64_t size) {
  constexpr int64_t kWidth = Vector<T>::kWidth;
  T lowest = x[0];
  int64_t i = 0;
  if (size >= kWidth) {
    typename Vector<T>::Type low, v;
    Vector<T>::load(x, low);
    for (i = kWidth; i + kWidth <= size; i += kWidth) {
      Vector<T>::load(x + i, v);
      low = v < low ? v : low;
    }
    T lanes[kWidth];
    Vector<T>::store(low, lanes);
    for (const T lane : lanes) lowest = lane < lowest ? lane : lowest;
  }
  for (; i < size; ++i) lowest = x[i] < lowest ? x[i] : lowest;
  return lowest;
}

// The first place of `value`; 0 if it is nowhere (NaN).
template <typename T>
int64_t place_of(T value, const T* x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (x[i] == value) return i;
  }
  return 0;
}

// sums(r) += sum over u < count of coefficients[r * row + u * step] x(u), for kRows rows, kVectors vectors at a time.
// Rows of x are x_stride apart, rows of sums sums_stride. Each element is added in the order of u.
template <int kRows, int kVectors, typename T>
inline int64_t add_products(
    int64_t from, int64_t size, int64_t count, const T* x, int64_t x_stride, const T* coefficients, int64_t row,
    int64_t step, T* sums, int64_t sums_stride) {
  constexpr int64_t kWidth = Vector<T>::kWidth;
  int64_t i = from;
  for (; i + kVectors * kWidth <= size; i += kVectors * kWidth) {
    typename Vector<T>::Type total[kRows][kVectors], v[kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kVectors; ++k) Vector<T>::load(sums + r * sums_stride + i + k * kWidth, total[r][k]);
    }
    for (int64_t u = 0; u < count; ++u) {
      for (int k = 0; k < kVectors; ++k) Vector<T>::load(x + u * x_stride + i + k * kWidth, v[k]);
      for (int r = 0; r < kRows; ++r) {
        const T coefficient = coefficients[r * row + u * step];
        for (int k = 0; k < kVectors; ++k) total[r][k] += coefficient * v[k];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kVectors; ++k) Vector<T>::store(total[r][k], sums + r * sums_stride + i + k * kWidth);
    }
  }
  return i;
}

template <int kRows, typename T>
inline void add_products_to_rows(
    int64_t size, int64_t count, const T* x, int64_t x_stride, const T* coefficients, int64_t row, int64_t step,
    T* sums, int64_t sums_stride) {
  int64_t i = 0;
  i = add_products<kRows, kRows == 1 ? 4 : 2>(
      i, size, count, x, x_stride, coefficients, row, step, sums, sums_stride);
  i = add_products<kRows, 1>(i, size, count, x, x_stride, coefficients, row, step, sums, sums_stride);
  for (; i < size; ++i) {
    for (int64_t r = 0; r < kRows; ++r) {
      T total = sums[r * sums_stride + i];
      for (int64_t u = 0; u < count; ++u) total += coefficients[r * row + u * step] * x[u * x_stride + i];
      sums[r * sums_stride + i] = total;
    }
  }
}

// The same for any number of rows.
template <typename T>
void add_products(
    int64_t size, int64_t rows, int64_t count, const T* x, int64_t x_stride, const T* coefficients, int64_t row,
    int64_t step, T* sums, int64_t sums_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    add_products_to_rows<4>(
        size, count, x, x_stride, coefficients + r * row, row, step, sums + r * sums_stride, sums_stride);
  }
  for (; r < rows; ++r) {
    add_products_to_rows<1>(
        size, count, x, x_stride, coefficients + r * row, row, step, sums + r * sums_stride, sums_stride);
  }
}

// results[a * row + b * step] = <x(a), y(b)> for kX rows of x and kY rows of y.
template <int kX, int kY, typename T>
inline void inner_products(
    int64_t size, const T* x, int64_t x_stride, const T* y, int64_t y_stride, double* results, int64_t row,
    int64_t step) {
  constexpr int64_t kWidth = Lanes<T>::kWidth;
  Lanes<T> total[kX][kY] = {}, v[kX], w;
  int64_t i = 0;
  const auto add = [&](const auto& load_lanes) {
    for (int a = 0; a < kX; ++a) load_lanes(x + a * x_stride + i, v[a]);
    for (int b = 0; b < kY; ++b) {
      load_lanes(y + b * y_stride + i, w);
      for (int a = 0; a < kX; ++a) {
        for (int p = 0; p < Lanes<T>::kParts; ++p) total[a][b].part[p] += v[a].part[p] * w.part[p];
      }
    }
  };
  for (; i + kWidth <= size; i += kWidth) add([](const T* from, Lanes<T>& to) { to.load(from); });
  if (i < size) add([=](const T* from, Lanes<T>& to) { to.load_some(from, size - i); });
  for (int a = 0; a < kX; ++a) {
    for (int b = 0; b < kY; ++b) results[a * row + b * step] = sum_of(total[a][b]);
  }
}

template <int kX, typename T>
inline void inner_products_of(
    int64_t size, const T* x, int64_t x_stride, int64_t y_rows, const T* y, int64_t y_stride, double* results,
    int64_t row, int64_t step) {
  constexpr int kY = Lanes<T>::kParts == 1 ? 4 : 2;
  int64_t b = 0;
  for (; b + kY <= y_rows; b += kY) {
    inner_products<kX, kY>(size, x, x_stride, y + b * y_stride, y_stride, results + b * step, row, step);
  }
  for (; b < y_rows; ++b) {
    inner_products<kX, 1>(size, x, x_stride, y + b * y_stride, y_stride, results + b * step, row, step);
  }
}

// The same for any number of rows.
template <typename T>
void inner_products(
    int64_t size, int64_t x_rows, const T* x, int64_t x_stride, int64_t y_rows, const T* y, int64_t y_stride,
    double* results, int64_t row, int64_t step) {
  constexpr int kX = Lanes<T>::kParts == 1 ? 4 : Lanes<T>::kParts == 2 ? 2 : 1;
  int64_t a = 0;
  for (; a + kX <= x_rows; a += kX) {
    inner_products_of<kX>(
        size, x + a * x_stride, x_stride, y_rows, y, y_stride, results + a * row, row, step);
  }
  for (; a < x_rows; ++a) {
    inner_products_of<1>(size, x + a * x_stride, x_stride, y_rows, y, y_stride, results + a * row, row, step);
  }
}

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
