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

// All launch on `stream` (a cudaStream_t) and do not wait. They return a cudaError_t.
template <typename A>
int launch_head_pool(const AnyFeatureMap& map, const Pooled<A>& out, void* stream);

// Bytes of memory, aligned to 256, that the next two want on the current device.
int head_workspace_bytes(const AnyFeatureMap& map, int64_t hidden, int64_t* bytes);

template <typename A>
int launch_head_attend(
    const AnyFeatureMap& map, const AttendInput<A>& in, const Attended<A>& out, void* workspace, void* stream);

template <typename A>
int launch_head_attend_backward(
    const AnyFeatureMap& map,
    const AttendInput<A>& in,
    const Saved<A>& saved,
    const AttendedGrad<A>& grad,
    const AttendInputGrad<A>& out,
    void* workspace,
    void* stream);

// `map.data` is written.
template <typename A>
int launch_head_features_backward(const AnyFeatureMap& map, const FeaturesGradInput<A>& in, void* stream);

}  // namespace dan_fast
