// What both directions of the CPU scan walk the slots with: chunks, sums in a fixed order, products with a few rows.
// For `*_isa.cpp` files. Vectors are 64 bytes wide everywhere and the compiler splits them where registers are
// smaller, so that sums have the same order, and the same bits, on every instruction set.
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

template <typename T>
struct Vector {
  typedef T Type __attribute__((vector_size(64)));
  static constexpr int64_t kWidth = 64 / sizeof(T);
};

template <typename T>
inline void load(const T* from, typename Vector<T>::Type& to) {
  std::memcpy(&to, from, sizeof(to));
}

template <typename T>
inline void store(const typename Vector<T>::Type& from, T* to) {
  std::memcpy(to, &from, sizeof(from));
}

// The first `count` lanes; zeros in the rest.
template <typename T>
inline void load_some(const T* from, int64_t count, typename Vector<T>::Type& to) {
  T lanes[Vector<T>::kWidth] = {};
  for (int64_t k = 0; k < count; ++k) lanes[k] = from[k];
  load(lanes, to);
}

template <typename T>
inline double sum_of_lanes(const typename Vector<T>::Type& vector) {
  T lanes[Vector<T>::kWidth];
  store(vector, lanes);
  double sums[Vector<T>::kWidth / 2];
  int64_t half = Vector<T>::kWidth / 2;
  for (int64_t k = 0; k < half; ++k) sums[k] = static_cast<double>(lanes[k]) + static_cast<double>(lanes[k + half]);
  for (half /= 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

template <typename T>
double sum(const T* x, int64_t size) {
  constexpr int64_t kWidth = Vector<T>::kWidth;
  typename Vector<T>::Type sums[4] = {}, v;
  int64_t i = 0;
  for (; i + 4 * kWidth <= size; i += 4 * kWidth) {
    for (int64_t k = 0; k < 4; ++k) {
      load(x + i + k * kWidth, v);
      sums[k] += v;
    }
  }
  for (int64_t k = 0; i < size; i += kWidth, ++k) {
    load_some(x + i, size - i < kWidth ? size - i : kWidth, v);
    sums[k] += v;
  }
  return sum_of_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The smallest of `size` >= 1 numbers.
template <typename T>
T least(const T* x, int64_t size) {
  constexpr int64_t kWidth = Vector<T>::kWidth;
  T lowest = x[0];
  int64_t i = 0;
  if (size >= kWidth) {
    typename Vector<T>::Type low, v;
    load(x, low);
    for (i = kWidth; i + kWidth <= size; i += kWidth) {
      load(x + i, v);
      low = v < low ? v : low;
    }
    T lanes[kWidth];
    store(low, lanes);
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
      for (int k = 0; k < kVectors; ++k) load(sums + r * sums_stride + i + k * kWidth, total[r][k]);
    }
    for (int64_t u = 0; u < count; ++u) {
      for (int k = 0; k < kVectors; ++k) load(x + u * x_stride + i + k * kWidth, v[k]);
      for (int r = 0; r < kRows; ++r) {
        const T coefficient = coefficients[r * row + u * step];
        for (int k = 0; k < kVectors; ++k) total[r][k] += coefficient * v[k];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kVectors; ++k) store(total[r][k], sums + r * sums_stride + i + k * kWidth);
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
  constexpr int64_t kWidth = Vector<T>::kWidth;
  typename Vector<T>::Type total[kX][kY] = {}, v[kX], w;
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    for (int a = 0; a < kX; ++a) load(x + a * x_stride + i, v[a]);
    for (int b = 0; b < kY; ++b) {
      load(y + b * y_stride + i, w);
      for (int a = 0; a < kX; ++a) total[a][b] += v[a] * w;
    }
  }
  if (i < size) {
    for (int a = 0; a < kX; ++a) load_some(x + a * x_stride + i, size - i, v[a]);
    for (int b = 0; b < kY; ++b) {
      load_some(y + b * y_stride + i, size - i, w);
      for (int a = 0; a < kX; ++a) total[a][b] += v[a] * w;
    }
  }
  for (int a = 0; a < kX; ++a) {
    for (int b = 0; b < kY; ++b) results[a * row + b * step] = sum_of_lanes<T>(total[a][b]);
  }
}

// The same for any number of rows.
template <typename T>
void inner_products(
    int64_t size, int64_t x_rows, const T* x, int64_t x_stride, int64_t y_rows, const T* y, int64_t y_stride,
    double* results, int64_t row, int64_t step) {
  int64_t a = 0;
  for (; a + 4 <= x_rows; a += 4) {
    int64_t b = 0;
    for (; b + 4 <= y_rows; b += 4) {
      inner_products<4, 4>(
          size, x + a * x_stride, x_stride, y + b * y_stride, y_stride, results + a * row + b * step, row, step);
    }
    for (; b < y_rows; ++b) {
      inner_products<4, 1>(
          size, x + a * x_stride, x_stride, y + b * y_stride, y_stride, results + a * row + b * step, row, step);
    }
  }
  for (; a < x_rows; ++a) {
    for (int64_t b = 0; b < y_rows; ++b) {
      inner_products<1, 1>(
          size, x + a * x_stride, x_stride, y + b * y_stride, y_stride, results + a * row + b * step, row, step);
    }
  }
}

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
