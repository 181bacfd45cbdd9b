// What the bindings see of the CUDA attention head. Plain C++, so that they compile without the CUDA headers. All
// pointers are device memory of the current device; A is double for kFloat64, else float.
#pragma once

#include "../memory/row_norms_launch.h"
#include "head.h"

namespace dan_fast {

// As FeatureMap, the dtype told apart at run time.
struct AnyFeatureMap {
  Scalar scalar;
  void* data;
  int64_t batch, channels, positions;
  int64_t sample_stride, channel_stride, position_stride;
};

// Bytes of memory, aligned to 256, that one direction wants on the current device. Returns a cudaError_t, as the next do.
template <typename A>
int head_workspace_bytes(Scalar scalar, const HeadInput<void, A>& in, bool backward, int64_t* bytes);

// The whole head, and its derivative; X is of type `scalar`. They launch on `stream` (a cudaStream_t) and do not wait.
template <typename A>
int launch_head_forward(
    Scalar scalar, const HeadInput<void, A>& in, const HeadOutput<A>& out, void* workspace, void* stream);
template <typename A>
int launch_head_backward(
    Scalar scalar,
    const HeadInput<void, A>& in,
    const HeadSaved<A>& saved,
    const HeadGrad<A>& grad,
    const HeadInputGrad<void, A>& out,
    void* workspace,
    void* stream);

}  // namespace dan_fast
