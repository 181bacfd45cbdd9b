#include <cuda_runtime.h>

#include <climits>

#include "false_sets.cuh"

namespace dan_fast {
namespace {

constexpr int kThreads = 1024;

template <typename S>
__global__ void __launch_bounds__(kThreads) false_sets_kernel(const FalseSets sets) {
  __shared__ FalseSetsShared<ValueKey<S>> shared;
  FalseSetsRow<S>(sets, shared).run();
}

}  // namespace

template <typename S>
int launch_false_sets(const FalseSets& sets, void* stream) {
  if (sets.rows > INT_MAX || sets.slots > INT_MAX) return cudaErrorInvalidValue;
  if (sets.rows == 0 || sets.slots == 0) return cudaSuccess;
  false_sets_kernel<S>
      <<<static_cast<unsigned>(sets.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(sets);
  return cudaGetLastError();
}

#define DAN_FAST_INSTANTIATE(S, A) template int launch_false_sets<S>(const FalseSets&, void*);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast
