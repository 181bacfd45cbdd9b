// The kernels of the attention head and their launches. A head_cuda_*.cu compiles those of one type of map, so that
// they do it at the same time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <type_traits>

#include "../cuda/resident.cuh"
#include "head_cuda_attend_backward.cuh"
#include "head_cuda_features.cuh"
#include "head_cuda_pool.cuh"
#include "head_launch.h"

namespace dan_fast {

template <typename S>
using HeadStatistic = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Blocks a multiprocessor that the registers shall leave room for: with 3, all of 64 samples of 5 blocks run at once
// on 132 multiprocessors. Fewer where they would spill: with numbers of 8 bytes, and in the derivative over contiguous
// maps.
template <typename S, bool kChannelsLast, bool kBackward>
constexpr int kHeadBlocks = std::is_same_v<S, double> ? 1 : kBackward && !kChannelsLast ? 2 : 3;

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kHeadThreads)
    head_pool_kernel(const FeatureMap<const S> map, const Pooled<A> out, const HeadPlan plan) {
  extern __shared__ __align__(16) unsigned char shared[];
  head_pool_block<S, A, kChannelsLast>(map, out, plan, shared);
}

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks<S, kChannelsLast, false>) head_attend_kernel(
    const FeatureMap<const S> map, const AttendInput<A> in, const Attended<A> out, const HeadPlan plan,
    const HeadWorkspace<A> workspace) {
  extern __shared__ __align__(16) unsigned char shared[];
  head_attend_block<S, A, kChannelsLast>(map, in, out, plan, workspace, shared);
}

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks<S, kChannelsLast, true>) head_attend_backward_kernel(
    const FeatureMap<const S> map, const AttendInput<A> in, const Saved<A> saved, const AttendedGrad<A> grad,
    const AttendInputGrad<A> out, const HeadPlan plan, const HeadWorkspace<A> workspace) {
  extern __shared__ __align__(16) unsigned char shared[];
  head_attend_backward_block<S, A, kChannelsLast>(map, in, saved, grad, out, plan, workspace, shared);
}

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kHeadThreads)
    head_features_backward_kernel(const FeatureMap<S> map, const FeaturesGradInput<A> in) {
  __shared__ FeaturesGradShared<A> shared;
  head_features_backward_block<S, A, kChannelsLast>(map, in, shared);
}

// The launches for maps of S in one layout.
template <typename S, bool kChannelsLast>
class HeadLayout {
 public:
  using A = HeadStatistic<S>;

  HeadLayout(const AnyFeatureMap& map, int64_t hidden, void* stream)
      : map_(map), sizes_{map.batch, map.channels, map.positions, hidden}, stream_(static_cast<cudaStream_t>(stream)) {}

  cudaError_t pool(const Pooled<A>& out) const {
    const HeadPlan plan = planning(kHeadPoolBytes).pool(sizes_);
    if (plan.blocks() > INT_MAX) return cudaErrorInvalidValue;
    if (plan.blocks() == 0) return cudaSuccess;
    const unsigned blocks = static_cast<unsigned>(plan.blocks());
    const size_t shared_bytes = static_cast<size_t>(plan.shared_bytes);
    head_pool_kernel<S, A, kChannelsLast><<<blocks, kHeadThreads, shared_bytes, stream_>>>(read(), out, plan);
    return cudaGetLastError();
  }

  cudaError_t workspace_bytes(int64_t* bytes) const {
    *bytes = 0;
    for (const bool backward : {false, true}) {
      HeadPlan plan;
      HeadWorkspace<A> workspace;
      int64_t needed = 0;
      const cudaError_t status = prepare(backward, nullptr, &plan, &workspace, &needed);
      if (status != cudaSuccess) return status;
      *bytes = std::max(*bytes, needed);
    }
    return cudaSuccess;
  }

  cudaError_t attend(const AttendInput<A>& in, const Attended<A>& out, void* memory) const {
    FeatureMap<const S> map = read();
    HeadPlan plan;
    HeadWorkspace<A> workspace;
    void* arguments[] = {&map, const_cast<AttendInput<A>*>(&in), const_cast<Attended<A>*>(&out), &plan, &workspace};
    return launch(false, memory, &plan, &workspace, arguments);
  }

  cudaError_t attend_backward(
      const AttendInput<A>& in, const Saved<A>& saved, const AttendedGrad<A>& grad, const AttendInputGrad<A>& out,
      void* memory) const {
    FeatureMap<const S> map = read();
    HeadPlan plan;
    HeadWorkspace<A> workspace;
    void* arguments[] = {
        &map, const_cast<AttendInput<A>*>(&in), const_cast<Saved<A>*>(&saved), const_cast<AttendedGrad<A>*>(&grad),
        const_cast<AttendInputGrad<A>*>(&out), &plan, &workspace};
    return launch(true, memory, &plan, &workspace, arguments);
  }

  cudaError_t features_backward(const FeaturesGradInput<A>& in) const {
    const int64_t blocks = sizes_.batch * ((sizes_.channels + kGradChannels - 1) / kGradChannels) *
                           ((sizes_.positions + kGradPositions - 1) / kGradPositions);
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    if (blocks == 0) return cudaSuccess;
    const FeatureMap<S> map = fill<S>();
    head_features_backward_kernel<S, A, kChannelsLast>
        <<<static_cast<unsigned>(blocks), kHeadThreads, 0, stream_>>>(map, in);
    return cudaGetLastError();
  }

 private:
  template <typename T>
  FeatureMap<T> fill() const {
    return {static_cast<T*>(map_.data), map_.batch,          map_.channels,       map_.positions,
            map_.sample_stride,         map_.channel_stride, map_.position_stride};
  }

  FeatureMap<const S> read() const { return fill<const S>(); }

  static HeadPlanning planning(int64_t shared_limit) {
    return {sizeof(S), sizeof(A), kChannelsLast, kHeadThreads, shared_limit};
  }

  static const void* kernel(bool backward) {
    return backward ? reinterpret_cast<const void*>(head_attend_backward_kernel<S, A, kChannelsLast>)
                    : reinterpret_cast<const void*>(head_attend_kernel<S, A, kChannelsLast>);
  }

  cudaError_t prepare(
      bool backward, void* memory, HeadPlan* plan, HeadWorkspace<A>* workspace, int64_t* bytes) const {
    static ResidentBlocks resident[2];
    int64_t blocks = 0;
    const cudaError_t status =
        resident[backward].ask(kernel(backward), kHeadThreads, static_cast<size_t>(kHeadSharedBytes), &blocks);
    if (status != cudaSuccess) return status;
    *plan = plan_attend<A>(planning(kHeadSharedBytes), sizes_, backward, blocks);
    *bytes = workspace->lay_out(memory, sizes_, *plan, backward);
    return cudaSuccess;
  }

  cudaError_t launch(
      bool backward, void* memory, HeadPlan* plan, HeadWorkspace<A>* workspace, void** arguments) const {
    int64_t bytes = 0;
    cudaError_t status = prepare(backward, memory, plan, workspace, &bytes);
    if (status != cudaSuccess) return status;
    const size_t cleared = static_cast<size_t>(HeadWorkspace<A>::cleared_bytes(sizes_));
    status = cudaMemsetAsync(workspace->arrived, 0, cleared, stream_);
    if (status != cudaSuccess) return status;
    return cudaLaunchCooperativeKernel(
        kernel(backward), static_cast<unsigned>(plan->blocks()), kHeadThreads, arguments,
        static_cast<size_t>(plan->shared_bytes), stream_);
  }

  const AnyFeatureMap& map_;
  const HeadSizes sizes_;
  const cudaStream_t stream_;
};

// call(layout) for the layout of the map.
template <typename S, typename Call>
cudaError_t for_layout(const AnyFeatureMap& map, int64_t hidden, void* stream, const Call& call) {
  if (map.position_stride == 1) return call(HeadLayout<S, false>(map, hidden, stream));
  if (map.channel_stride == 1) return call(HeadLayout<S, true>(map, hidden, stream));
  return cudaErrorInvalidValue;
}

// The launches for maps of S in any layout.
template <typename S>
struct HeadKernels {
  using A = HeadStatistic<S>;
  static cudaError_t pool(const AnyFeatureMap& map, const Pooled<A>& out, void* stream);
  static cudaError_t workspace_bytes(const AnyFeatureMap& map, int64_t hidden, int64_t* bytes);
  static cudaError_t attend(
      const AnyFeatureMap& map, const AttendInput<A>& in, const Attended<A>& out, void* workspace, void* stream);
  static cudaError_t attend_backward(
      const AnyFeatureMap& map, const AttendInput<A>& in, const Saved<A>& saved, const AttendedGrad<A>& grad,
      const AttendInputGrad<A>& out, void* workspace, void* stream);
  static cudaError_t features_backward(const AnyFeatureMap& map, const FeaturesGradInput<A>& in, void* stream);
};

template <typename S>
cudaError_t HeadKernels<S>::pool(const AnyFeatureMap& map, const Pooled<A>& out, void* stream) {
  return for_layout<S>(map, 0, stream, [&](const auto& layout) { return layout.pool(out); });
}

template <typename S>
cudaError_t HeadKernels<S>::workspace_bytes(const AnyFeatureMap& map, int64_t hidden, int64_t* bytes) {
  return for_layout<S>(map, hidden, nullptr, [&](const auto& layout) { return layout.workspace_bytes(bytes); });
}

template <typename S>
cudaError_t HeadKernels<S>::attend(
    const AnyFeatureMap& map, const AttendInput<A>& in, const Attended<A>& out, void* workspace, void* stream) {
  return for_layout<S>(map, in.weights.hidden, stream, [&](const auto& layout) {
    return layout.attend(in, out, workspace);
  });
}

template <typename S>
cudaError_t HeadKernels<S>::attend_backward(
    const AnyFeatureMap& map, const AttendInput<A>& in, const Saved<A>& saved, const AttendedGrad<A>& grad,
    const AttendInputGrad<A>& out, void* workspace, void* stream) {
  return for_layout<S>(map, in.weights.hidden, stream, [&](const auto& layout) {
    return layout.attend_backward(in, saved, grad, out, workspace);
  });
}

template <typename S>
cudaError_t HeadKernels<S>::features_backward(
    const AnyFeatureMap& map, const FeaturesGradInput<A>& in, void* stream) {
  return for_layout<S>(map, 0, stream, [&](const auto& layout) { return layout.features_backward(in); });
}

}  // namespace dan_fast
