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

// What a product prefetches, a line at a time while it multiplies: a burst of requests would stall it.
struct NothingAhead {
  void next() {}
};

// `pieces` of adjacent bytes, the first at `from`, one after the other `stride` bytes apart, spread over `count` calls.
class PiecesAhead {
 public:
  PiecesAhead(const void* from, int64_t bytes, int64_t stride, int64_t pieces, int64_t count)
      : line_(static_cast<const char*>(from)), calls_(std::max<int64_t>(1, count / std::max<int64_t>(1, pieces))),
        step_(pieces < 1 ? 0 : bytes / calls_ + 1), jump_(pieces < 1 ? 0 : stride - calls_ * step_), left_(calls_) {}

  void next() {
    __builtin_prefetch(line_, 0, 2);
    line_ += step_;
    if (--left_ > 0) return;
    line_ += jump_;
    left_ = calls_;
  }

 private:
  const char* line_;
  const int64_t calls_, step_, jump_;
  int64_t left_;
};

// finish(r, v, sum_k rows[r][k * step] panel[k][c]) for R rows and V vectors of columns. Every sum is one chain in the
// order of k, whatever R, V and its place: equal rows have equal bits. R x V sums should leave room for a line and a
// factor; inlined, the rows' addresses would lose their registers to the caller.
template <int R, int V, typename A, typename Ahead, typename Finish>
__attribute__((noinline)) void multiply_each(const A* const* rows, int64_t count, const A* panel, int64_t step,
                                             Ahead ahead, const Finish& finish) {
  Vector<A> sums[R][V] = {};
  const A* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  for (int64_t k = 0; k < count; ++k, panel += V * kWidth<A>) {
    ahead.next();
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
    for (int v = 0; v < V; ++v) finish(r, v, sums[r][v]);
  }
}

// out[r][c] (+)= those sums.
template <int R, int V, typename A, typename Ahead = NothingAhead>
inline void multiply(const A* const* rows, int64_t count, const A* panel, bool add, A* out, int64_t out_stride,
                     int64_t step = 1, Ahead ahead = {}) {
  multiply_each<R, V>(rows, count, panel, step, ahead, [=](int r, int v, Vector<A> sum) {
    A* to = out + r * out_stride + v * kWidth<A>;
    store(to, add ? load(to) + sum : sum);
  });
}

// The rows of a tile that begins at `row`; where there are fewer than R left, the last one stands in.
template <int R, typename A>
inline void point_at(const A* matrix, int64_t stride, int64_t row, int64_t rows, int64_t column, const A** pointers) {
  for (int r = 0; r < R; ++r) pointers[r] = matrix + std::min(row + r, rows - 1) * stride + column;
}

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
