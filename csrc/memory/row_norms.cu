#include "row_norms.cuh"

#include <climits>

#include "../cuda/element.cuh"
#include "row_norms.h"

namespace dan_fast {

template <typename S>
int launch_row_sq_norms(
    const S* features, int64_t row_stride, int64_t rows, int64_t columns, Statistic<S>* norms, void* stream) {
  constexpr int kThreads = 256;
  constexpr int64_t kRows = kThreads / kLanes;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  row_sq_norms_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const Element<S>*>(features), row_stride, rows, columns, norms);
  return cudaGetLastError();
}

#define DAN_FAST_INSTANTIATE(S, A) \
  template int launch_row_sq_norms<S>(const S*, int64_t, int64_t, int64_t, A*, void*);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast
