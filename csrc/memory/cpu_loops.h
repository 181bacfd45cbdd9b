// What the CPU kernels of this room walk slots with: chunks, sums in a fixed order, products with a few rows. For
// `*_isa.cpp` files.
#pragma once

#include <cstdint>
#include <cstring>

#include "../cpu/parallel.h"
#include "../cpu/vector.h"
#include "rules.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Slots a piece of work: its temporaries stay in the first cache. Sums are made per chunk, then over chunks in order.
constexpr int64_t kChunk = 512;
// Below 4096 slots a walk costs less than waking a thread.
constexpr int64_t kGrain = 4096 / kChunk;

struct Chunk {
  int64_t index, begin, size;
};

inline int64_t chunks_of(int64_t slots) { return (slots + kChunk - 1) / kChunk; }

// body(Chunk) for all chunks of [0, slots), each of which is walked `walks` times.
template <typename Body>
void for_chunks(int64_t slots, ParallelFor parallel, const Body& body, int64_t walks = 1) {
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
  const int64_t chunks = chunks_of(slots), grain = walks < kGrain ? kGrain / walks : 1;
  if (chunks <= grain) {
    task(&work, 0, chunks);
  } else {
    parallel(chunks, grain, task, &work);
  }
}

template <typename T>
void copy(const T* from, int64_t size, T* to) {
  std::memcpy(to, from, static_cast<size_t>(size) * sizeof(T));
}

template <typename T>
void fill(T* to, int64_t size, T value) {
  for (int64_t i = 0; i < size; ++i) to[i] = value;
}

// The partial sums of one total.
template <typename T>
struct Lanes {
  Vector<T> part[kParts<T>];

  void load_all(const T* from) {
    for (int p = 0; p < kParts<T>; ++p) part[p] = load(from + p * kWidth<T>);
  }
  // The first `count` lanes; zeros in the rest.
  void load_some(const T* from, int64_t count) {
    T lanes[kLanes<T>] = {};
    for (int64_t k = 0; k < count; ++k) lanes[k] = from[k];
    load_all(lanes);
  }
};

template <typename T>
inline double sum_of(const Lanes<T>& partial) {
  constexpr int64_t kHalf = kLanes<T> / 2;
  T lanes[kLanes<T>];
  for (int p = 0; p < kParts<T>; ++p) store(lanes + p * kWidth<T>, partial.part[p]);
  double sums[kHalf];
  for (int64_t k = 0; k < kHalf; ++k) sums[k] = static_cast<double>(lanes[k]) + static_cast<double>(lanes[k + kHalf]);
  return add_halves<kHalf>(sums);
}

template <typename T>
double sum(const T* x, int64_t size) {
  Lanes<T> sums[2] = {}, v;
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= size; i += 2 * kLanes<T>) {
    for (int k = 0; k < 2; ++k) {
      v.load_all(x + i + k * kLanes<T>);
      for (int p = 0; p < kParts<T>; ++p) sums[k].part[p] += v.part[p];
    }
  }
  for (int k = 0; i < size; i += kLanes<T>, ++k) {
    v.load_some(x + i, size - i < kLanes<T> ? size - i : kLanes<T>);
    for (int p = 0; p < kParts<T>; ++p) sums[k].part[p] += v.part[p];
  }
  for (int p = 0; p < kParts<T>; ++p) sums[0].part[p] += sums[1].part[p];
  return sum_of(sums[0]);
}

// The smallest of `size` >= 1 numbers by is_less: NaN if there is one.
template <typename T>
T least(const T* x, int64_t size) {
  T lowest = x[0];
  int64_t i = 0;
  if (size >= kWidth<T>) {
    Vector<T> low = load(x);
    for (i = kWidth<T>; i + kWidth<T> <= size; i += kWidth<T>) {
      const Vector<T> v = load(x + i);
      low = (v < low) | (v != v) ? v : low;
    }
    T lanes[kWidth<T>];
    store(lanes, low);
    for (const T lane : lanes) lowest = is_less(lane, lowest) ? lane : lowest;
  }
  for (; i < size; ++i) lowest = is_less(x[i], lowest) ? x[i] : lowest;
  return lowest;
}

// The first place of the least one.
template <typename T>
int64_t place_of(T lowest, const T* x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (!is_less(lowest, x[i])) return i;
  }
  return 0;
}

// sums(r) += sum over u < count of coefficients[r * row + u * step] x(u), for kRows rows, kVectors vectors at a time.
// Rows of x are x_stride apart, rows of sums sums_stride. Each element is added in the order of u.
template <int kRows, int kVectors, typename T>
inline int64_t add_products(
    int64_t from, int64_t size, int64_t count, const T* x, int64_t x_stride, const T* coefficients, int64_t row,
    int64_t step, T* sums, int64_t sums_stride) {
  int64_t i = from;
  for (; i + kVectors * kWidth<T> <= size; i += kVectors * kWidth<T>) {
    Vector<T> total[kRows][kVectors], v[kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kVectors; ++k) total[r][k] = load(sums + r * sums_stride + i + k * kWidth<T>);
    }
    for (int64_t u = 0; u < count; ++u) {
      for (int k = 0; k < kVectors; ++k) v[k] = load(x + u * x_stride + i + k * kWidth<T>);
      for (int r = 0; r < kRows; ++r) {
        const T coefficient = coefficients[r * row + u * step];
        for (int k = 0; k < kVectors; ++k) total[r][k] += coefficient * v[k];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kVectors; ++k) store(sums + r * sums_stride + i + k * kWidth<T>, total[r][k]);
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
  Lanes<T> total[kX][kY] = {}, v[kX], w;
  int64_t i = 0;
  const auto add = [&](const auto& load_lanes) {
    for (int a = 0; a < kX; ++a) load_lanes(x + a * x_stride + i, v[a]);
    for (int b = 0; b < kY; ++b) {
      load_lanes(y + b * y_stride + i, w);
      for (int a = 0; a < kX; ++a) {
        for (int p = 0; p < kParts<T>; ++p) total[a][b].part[p] += v[a].part[p] * w.part[p];
      }
    }
  };
  for (; i + kLanes<T> <= size; i += kLanes<T>) add([](const T* from, Lanes<T>& to) { to.load_all(from); });
  if (i < size) add([=](const T* from, Lanes<T>& to) { to.load_some(from, size - i); });
  for (int a = 0; a < kX; ++a) {
    for (int b = 0; b < kY; ++b) results[a * row + b * step] = sum_of(total[a][b]);
  }
}

template <int kX, typename T>
inline void inner_products_of(
    int64_t size, const T* x, int64_t x_stride, int64_t y_rows, const T* y, int64_t y_stride, double* results,
    int64_t row, int64_t step) {
  constexpr int kY = kParts<T> == 1 ? 4 : 2;
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
  constexpr int kX = kParts<T> == 1 ? 4 : kParts<T> == 2 ? 2 : 1;
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
