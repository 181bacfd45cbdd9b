// Squared L2 norms of the rows of a memory, n2_i = |m_i|^2: the loop of the CPU and the launch of row_norms.cuh. Plain
// C++17.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace dan_fast {

// Writes norms[first, last). Row i starts at features + i * row_stride; its columns are adjacent.
//
// Sums in double for every input type: reading the rows costs more than the conversion, and a float result is
// then correctly rounded but for one case in millions. Eight partial sums, because one chain of additions may
// not be reordered by the compiler and would neither vectorise nor hide the latency. One thread owns a row, so
// the result does not depend on the number of threads.
template <typename In, typename Out>
void row_sq_norms(const In* features, int64_t row_stride, int64_t columns, int64_t first, int64_t last, Out* norms) {
  constexpr int64_t kLanes = 8;
  for (int64_t row = first; row < last; ++row) {
    const In* x = features + row * row_stride;
    double sums[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const double v = static_cast<double>(x[c + lane]);
        sums[lane] += v * v;
      }
    }
    for (int64_t lane = 0; c < columns; ++c, ++lane) {
      const double v = static_cast<double>(x[c]);
      sums[lane] += v * v;
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    norms[row] = static_cast<Out>(sums[0]);
  }
}

// On CUDA: launches on `stream` (a cudaStream_t) of the current device and does not wait. Returns a cudaError_t.
template <typename S>
int launch_row_sq_norms(
    const S* features, int64_t row_stride, int64_t rows, int64_t columns, Statistic<S>* norms, void* stream);

}  // namespace dan_fast
