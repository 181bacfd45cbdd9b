// What the bindings see of the CUDA softmax. Plain C++, so that they compile without the CUDA headers. T is float or
// double; all pointers are device memory of the current device.
#pragma once

#include "softmax.h"

namespace dan_fast {

// Launch on `stream` (a cudaStream_t) and do not wait. Return a cudaError_t.
template <typename T>
int launch_slot_softmax(const SlotScores<T>& in, const uint8_t* occupied, T* weights, void* stream);

// `means`: room for B numbers.
template <typename T>
int launch_slot_softmax_backward(
    const SlotScores<T>& in, const SoftmaxGradient<T>& gradient, T* means, void* stream);

}  // namespace dan_fast
