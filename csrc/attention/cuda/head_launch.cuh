// The kernels of the attention head and their launches. Each file of ../instantiations compiles those of one type of
// map, so that they do it at the same time.
#pragma once

#include <climits>
#include <type_traits>

#include "../../cuda/cooperative.cuh"
#include "../../cuda/element.cuh"
#include "head_attend_backward.cuh"
#include "head_bottleneck_backward.cuh"
#include "head_features.cuh"
#include "head_forward.cuh"
#include "head_launch.h"

namespace dan_fast {

// Blocks a multiprocessor that the registers shall leave room for: with 3, all of 64 samples of 5 blocks run at once
// on 132 multiprocessors. Fewer where they would spill: with numbers of 8 bytes, and in the derivative over contiguous
// maps.
template <typename S, bool kChannelsLast, bool kBackward>
constexpr int kHeadBlocks = std::is_same_v<S, double> ? 1 : kBackward && !kChannelsLast ? 2 : 3;

// The bodies take their arguments by reference: __grid_constant__, or every thread would make itself a copy.
template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks<S, kChannelsLast, false>) head_forward_kernel(
    const __grid_constant__ HeadInput<S, A> in, const __grid_constant__ HeadOutput<A> out,
    const __grid_constant__ HeadPlan plan, const __grid_constant__ HeadWorkspace<A> workspace) {
  extern __shared__ __align__(16) unsigned char shared[];
  head_forward_block<S, A, kChannelsLast>(in, out, plan, workspace, shared);
}

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks<S, kChannelsLast, true>) head_attend_backward_kernel(
    const __grid_constant__ HeadInput<S, A> in, const __grid_constant__ HeadOutput<const A> saved,
    const __grid_constant__ HeadGrad<A> grad, const __grid_constant__ HeadPlan plan,
    const __grid_constant__ HeadWorkspace<A> workspace) {
  extern __shared__ __align__(16) unsigned char shared[];
  head_attend_backward_block<S, A, kChannelsLast>(in, saved, grad, plan, workspace, shared);
}

template <typename A>
__global__ void __launch_bounds__(kHeadThreads, 2) head_weights_backward_kernel(
    const __grid_constant__ HeadInput<void, A> in, const __grid_constant__ HeadOutput<const A> saved,
    const __grid_constant__ HeadWorkspace<A> workspace, const __grid_constant__ HeadInputGrad<void, A> out) {
  __shared__ A shared[HeadWeightsBackward<A>::kShared];
  head_weights_backward_block(in, saved, workspace, out, shared);
}

template <typename A>
__global__ void __launch_bounds__(kHeadThreads, 2) head_pooled_backward_kernel(
    const __grid_constant__ HeadInput<void, A> in, const __grid_constant__ HeadOutput<const A> saved,
    const A* grad_pooled, const __grid_constant__ HeadWorkspace<A> workspace,
    const __grid_constant__ HeadInputGrad<void, A> out) {
  head_pooled_backward_block(in, saved, grad_pooled, workspace, out);
}

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kHeadThreads)
    head_features_backward_kernel(const FeatureMap<S> map, const FeaturesGradInput<A> in) {
  __shared__ FeaturesGradShared<S, A> shared;
  head_features_backward_block<S, A, kChannelsLast>(map, in, shared);
}

// The kernels that walk no map, whatever it is stored in.
template <typename A>
struct HeadWeightKernels {
  static cudaError_t backward(
      const HeadInput<void, A>& in, const HeadOutput<const A>& saved, const A* grad_pooled,
      const HeadWorkspace<A>& workspace, const HeadInputGrad<void, A>& out, cudaStream_t stream);
};

template <typename A>
cudaError_t HeadWeightKernels<A>::backward(
    const HeadInput<void, A>& in, const HeadOutput<const A>& saved, const A* grad_pooled,
    const HeadWorkspace<A>& workspace, const HeadInputGrad<void, A>& out, cudaStream_t stream) {
  head_weights_backward_kernel<A><<<kHeadWeightBlocks, kHeadThreads, 0, stream>>>(in, saved, workspace, out);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  head_pooled_backward_kernel<A>
      <<<kHeadWeightBlocks, kHeadThreads, 0, stream>>>(in, saved, grad_pooled, workspace, out);
  return cudaGetLastError();
}

// The launches for maps of S in one layout.
template <typename S, bool kChannelsLast>
class HeadLayout {
 public:
  using A = Statistic<S>;

  HeadLayout(const HeadInput<S, A>& in, void* stream)
      : in_(in.template as<Element<S>>()), any_map_(in.template as<void>()),
        sizes_{in.features.batch, in.features.channels, in.features.positions, in.spatial.hidden, in.units},
        stream_(static_cast<cudaStream_t>(stream)) {}

  cudaError_t workspace_bytes(bool backward, int64_t* bytes) const {
    HeadPlan plan;
    HeadWorkspace<A> workspace;
    return prepare(backward, nullptr, &plan, &workspace, bytes);
  }

  cudaError_t forward(const HeadOutput<A>& out, void* memory) const {
    HeadPlan plan;
    HeadWorkspace<A> workspace;
    void* arguments[] = {
        const_cast<HeadInput<Element<S>, A>*>(&in_), const_cast<HeadOutput<A>*>(&out), &plan, &workspace};
    return launch(false, memory, &plan, &workspace, arguments);
  }

  cudaError_t backward(
      const HeadOutput<const A>& saved, const HeadGrad<A>& grad, const HeadInputGrad<S, A>& out, void* memory) const {
    HeadPlan plan;
    HeadWorkspace<A> workspace;
    void* arguments[] = {
        const_cast<HeadInput<Element<S>, A>*>(&in_), const_cast<HeadOutput<const A>*>(&saved),
        const_cast<HeadGrad<A>*>(&grad), &plan, &workspace};
    cudaError_t status = launch(true, memory, &plan, &workspace, arguments);
    if (status != cudaSuccess) return status;
    status = HeadWeightKernels<A>::backward(
        any_map_, saved, grad.pooled, workspace, out.template as<void>(), stream_);
    if (status != cudaSuccess) return status;
    const auto map = out.features.template as<Element<S>>();
    const FeaturesGradInput<A> features = features_grad_input(saved, grad, workspace);
    // The gradient of a map that had to be copied lies in memory otherwise than the copy.
    return map.position_stride == 1 ? features_backward<false>(map, features) : features_backward<true>(map, features);
  }

 private:
  template <bool kGradChannelsLast>
  cudaError_t features_backward(const FeatureMap<Element<S>>& map, const FeaturesGradInput<A>& in) const {
    const int64_t blocks = sizes_.batch * ((sizes_.channels + kGradChannels - 1) / kGradChannels) *
                           ((sizes_.positions + kGradPositions - 1) / kGradPositions);
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    if (blocks == 0) return cudaSuccess;
    head_features_backward_kernel<Element<S>, A, kGradChannelsLast>
        <<<static_cast<unsigned>(blocks), kHeadThreads, 0, stream_>>>(map, in);
    return cudaGetLastError();
  }

  static const void* kernel(bool backward) {
    return backward ? reinterpret_cast<const void*>(head_attend_backward_kernel<Element<S>, A, kChannelsLast>)
                    : reinterpret_cast<const void*>(head_forward_kernel<Element<S>, A, kChannelsLast>);
  }

  cudaError_t prepare(
      bool backward, void* memory, HeadPlan* plan, HeadWorkspace<A>* workspace, int64_t* bytes) const {
    static ResidentBlocks resident[2];
    int64_t blocks = 0;
    const cudaError_t status =
        resident[backward].ask(kernel(backward), kHeadThreads, static_cast<size_t>(kHeadSharedBytes), &blocks);
    if (status != cudaSuccess) return status;
    const HeadPlanning planning = {sizeof(S), sizeof(A), kChannelsLast, kHeadThreads, kHeadSharedBytes};
    *plan = plan_head<A>(planning, sizes_, backward, blocks);
    *bytes = workspace->lay_out(memory, sizes_, *plan, backward);
    return cudaSuccess;
  }

  // The cooperative kernel of either direction.
  cudaError_t launch(
      bool backward, void* memory, HeadPlan* plan, HeadWorkspace<A>* workspace, void** arguments) const {
    int64_t bytes = 0;
    const cudaError_t status = prepare(backward, memory, plan, workspace, &bytes);
    if (status != cudaSuccess) return status;
    const size_t cleared = static_cast<size_t>(HeadWorkspace<A>::cleared_bytes(sizes_));
    return launch_cooperative(
        kernel(backward), plan->blocks(), kHeadThreads, static_cast<size_t>(plan->shared_bytes), arguments,
        workspace->arrived, cleared, stream_);
  }

  const HeadInput<Element<S>, A> in_;
  const HeadInput<void, A> any_map_;
  const HeadSizes sizes_;
  const cudaStream_t stream_;
};

// call(layout) for the layout of the map.
template <typename S, typename Call>
cudaError_t for_layout(const HeadInput<S, Statistic<S>>& in, void* stream, const Call& call) {
  if (in.features.position_stride == 1) return call(HeadLayout<S, false>(in, stream));
  if (in.features.channel_stride == 1) return call(HeadLayout<S, true>(in, stream));
  return cudaErrorInvalidValue;
}

template <typename S>
int HeadCuda<S>::workspace_bytes(const HeadInput<S, A>& in, bool backward, int64_t* bytes) {
  return for_layout(in, nullptr, [&](const auto& layout) { return layout.workspace_bytes(backward, bytes); });
}

template <typename S>
int HeadCuda<S>::forward(const HeadInput<S, A>& in, const HeadOutput<A>& out, void* workspace, void* stream) {
  return for_layout(in, stream, [&](const auto& layout) { return layout.forward(out, workspace); });
}

template <typename S>
int HeadCuda<S>::backward(
    const HeadInput<S, A>& in, const HeadOutput<const A>& saved, const HeadGrad<A>& grad,
    const HeadInputGrad<S, A>& out, void* workspace, void* stream) {
  return for_layout(in, stream, [&](const auto& layout) { return layout.backward(saved, grad, out, workspace); });
}

}  // namespace dan_fast
