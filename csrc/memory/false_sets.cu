#include <cuda_runtime.h>

#include <climits>

#include "false_sets.cuh"
#include "false_sets_launch.h"

namespace dan_fast {
namespace {

constexpr int kThreads = 1024;

template <typename Format>
__global__ void __launch_bounds__(kThreads) false_sets_kernel(const FalseSets sets) {
  __shared__ FalseSetsShared<typename Format::Key> shared;
  FalseSetsRow<Format>(sets, shared).run();
}

}  // namespace

template <typename Format>
int launch_false_sets(const FalseSets& sets, void* stream) {
  if (sets.rows > INT_MAX || sets.slots > INT_MAX) return cudaErrorInvalidValue;
  if (sets.rows == 0 || sets.slots == 0) return cudaSuccess;
  false_sets_kernel<Format>
      <<<static_cast<unsigned>(sets.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(sets);
  return cudaGetLastError();
}

template int launch_false_sets<Binary64>(const FalseSets&, void*);
template int launch_false_sets<Binary32>(const FalseSets&, void*);
template int launch_false_sets<Binary16>(const FalseSets&, void*);
template int launch_false_sets<Brain16>(const FalseSets&, void*);

}  // namespace dan_fast
