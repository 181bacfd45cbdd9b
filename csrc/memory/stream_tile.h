// The product that the passes over a memory are made of: some rows times a packed panel, the sums held in registers.
// As internal to an instruction set as stream_vector.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "stream_vector.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Products added up one after the other before they join the total: short chains lose less to rounding.
constexpr int64_t kChain = 128;

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

template <typename A>
struct Scratch {
  explicit Scratch(int64_t size) : numbers(static_cast<A*>(::operator new(bytes(size), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(numbers, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  static size_t bytes(int64_t size) { return static_cast<size_t>(std::max<int64_t>(1, size)) * sizeof(A); }

  A* const numbers;
};

template <typename S, typename A>
inline void widen(const S* from, int64_t count, A* to) {
  int64_t c = 0;
  for (; c + kWidth<A> <= count; c += kWidth<A>) store(to + c, load_as<A>(from + c));
  if (c == count) return;
  const Vector<A> rest = load_some_as<A>(from + c, count - c);
  std::memcpy(to + c, &rest, static_cast<size_t>(count - c) * sizeof(A));
}

// out[r][c] (+)= sum_k rows[r][k * step] panel[k][c] for R rows and V vectors of columns. Every sum is one chain in the
// order of k, whatever R, V and its place: equal rows have equal bits. R x V sums should leave room for a line and a
// factor.
template <int R, int V, typename A>
inline void multiply(const A* const* rows, int64_t count, const A* panel, bool add, A* out, int64_t out_stride,
                     int64_t step = 1) {
  Vector<A> sums[R][V] = {};
  const A* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  for (int64_t k = 0; k < count; ++k, panel += V * kWidth<A>) {
    Vector<A> line[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) line[v] = load(panel + v * kWidth<A>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<A> factor = broadcast(row[r][k * step]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(factor, line[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      A* to = out + r * out_stride + v * kWidth<A>;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// The rows of a tile that begins at `row`; where there are fewer than R left, the last one stands in.
template <int R, typename A>
inline void point_at(const A* matrix, int64_t stride, int64_t row, int64_t rows, int64_t column, const A** pointers) {
  for (int r = 0; r < R; ++r) pointers[r] = matrix + std::min(row + r, rows - 1) * stride + column;
}

// Squared norms of R rows: eight partial sums a row in double, added up as row_norms.h does; `rows` may repeat.
template <int R, typename A>
inline void square_norms_of(const A* const* rows, int64_t columns, A* norms) {
  constexpr int64_t kLanes = 8;
  constexpr int kParts = kLanes / kWidth<double>;
  Vector<double> sums[R][kParts] = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const A* from = rows[r] + c + part * kWidth<double>;
        if constexpr (std::is_same_v<A, double>) {
          const Vector<double> x = load(from);
          sums[r][part] += x * x;
        } else {
          using Half = Vector<float, kVectorBytes / 2>;
          const Vector<double> x = __builtin_convertvector(load_bits<Half>(from), Vector<double>);
          // The square of a float is exact in double: fused or not, the bits are the same.
          sums[r][part] = multiply_add(x, x, sums[r][part]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    double lanes[kLanes];
    std::memcpy(lanes, sums[r], sizeof lanes);
    for (int64_t at = c, lane = 0; at < columns; ++at, ++lane) {
      const double x = rows[r][at];
      lanes[lane] += x * x;
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    norms[r] = static_cast<A>(lanes[0]);
  }
}

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
