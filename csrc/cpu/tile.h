// The product that all dense products on the CPU are made of: some rows times a packed panel, the sums held in
// registers. As internal to an instruction set as vector.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Products added up one after the other before they join the total: short chains lose less to rounding.
constexpr int64_t kChain = 128;

// A tile whose sums fill the registers but for a line and a factor.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kTileRows = 4, kTileVectors = 3;
#else
constexpr int kTileRows = kRegisters == 32 ? 8 : 4, kTileVectors = kRegisters == 32 ? 3 : 2;
#endif
template <typename A>
constexpr int64_t kStrip = kTileVectors * kWidth<A>;  // its columns

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

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
