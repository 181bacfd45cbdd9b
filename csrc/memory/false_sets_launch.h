// What the bindings see of the CUDA false sets. Plain C++, so that they compile without the CUDA headers.
#pragma once

#include "false_sets.h"

namespace dan_fast {

// Launches on `stream` (a cudaStream_t) and does not wait; all pointers are device memory of the current device.
// Returns a cudaError_t.
template <typename Format>
int launch_false_sets(const FalseSets& sets, void* stream);

}  // namespace dan_fast
