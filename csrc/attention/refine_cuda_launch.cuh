// The kernels of refine.h and their launches. A refine_cuda_*.cu compiles those of one type of map, so that they do it
// at the same time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <type_traits>

#include "adversary_cuda.cuh"

namespace dan_fast {

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kMapThreads)
    refine_kernel(const FeatureMap<const S> features, const Attentions<A> in, const FeatureMap<S> refined) {
  __shared__ MapWeights<A> shared;
  refine_block<S, A, kChannelsLast>(features, in, refined, shared);
}

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kMapThreads) refine_backward_kernel(
    const FeatureMap<const S> features, const Attentions<A> in, const FeatureMap<const S> refined_grad,
    const FeatureMap<S> features_grad, A* by_channel_attention, A* partial) {
  __shared__ MapShared<A> shared;
  refine_backward_block<S, A, kChannelsLast>(
      features, in, refined_grad, features_grad, by_channel_attention, partial, shared);
}

template <typename A>
__global__ void __launch_bounds__(kMapThreads)
    add_parts_kernel(const A* partial, int64_t parts, int64_t positions, int64_t size, A* sums) {
  add_parts(partial, parts, positions, size, sums);
}

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kMapThreads)
    channel_sums_kernel(const FeatureMap<const S> map, const A* weights, A* partial) {
  __shared__ MapShared<A> shared;
  channel_sums_block<S, A, kChannelsLast>(map, weights, partial, shared);
}

template <typename A>
__global__ void __launch_bounds__(kMapThreads) adversary_kernel(
    const A* partial_refined, const A* partial_features, int64_t channels, int64_t positions,
    const AdversaryInput<A> in, const Adversary<A> out) {
  __shared__ A handed[kMapThreads / kLanes];
  adversary_block(partial_refined, partial_features, channels, positions, in, out, handed);
}

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kMapThreads) adversary_backward_kernel(
    const FeatureMap<const S> features, const AdversaryInput<A> in, const AdversarySaved<A> saved,
    const FeatureMap<S> features_grad, const AdversaryInputGrad<A> out) {
  __shared__ MapShared<A> shared;
  adversary_backward_block<S, A, kChannelsLast>(features, in, saved, features_grad, out, shared);
}

template <typename T>
FeatureMap<T> as_map(const AnyFeatureMap& map) {
  return {static_cast<T*>(map.data), map.batch,          map.channels,       map.positions,
          map.sample_stride,         map.channel_stride, map.position_stride};
}

// launch(std::true_type) where the channels of the map are adjacent, std::false_type where the positions are, unless
// there is nothing to do.
template <typename Launch>
cudaError_t for_map(const AnyFeatureMap& map, const Launch& launch) {
  const int64_t blocks = map.batch * map_parts(map.channels);
  if (blocks > INT_MAX || (map.position_stride != 1 && map.channel_stride != 1)) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  map.position_stride == 1 ? launch(std::false_type{}) : launch(std::true_type{});
  return cudaGetLastError();
}

inline unsigned map_blocks(const AnyFeatureMap& map) {
  return static_cast<unsigned>(map.batch * map_parts(map.channels));
}

// The launches for maps of S.
template <typename S>
struct RefineKernels {
  using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
  static cudaError_t refine(
      const AnyFeatureMap& features, const Attentions<A>& in, const AnyFeatureMap& refined, cudaStream_t stream);
  static cudaError_t refine_backward(
      const AnyFeatureMap& features, const Attentions<A>& in, const AnyFeatureMap& refined_grad,
      const AnyFeatureMap& features_grad, const AttentionGrads<A>& out, A* partial, cudaStream_t stream);
  static cudaError_t adversary(
      const AnyFeatureMap& features, const AnyFeatureMap& refined, const AdversaryInput<A>& in,
      const Adversary<A>& out, A* partial, cudaStream_t stream);
  static cudaError_t adversary_backward(
      const AnyFeatureMap& features, const AdversaryInput<A>& in, const AdversarySaved<A>& saved,
      const AnyFeatureMap& features_grad, const AdversaryInputGrad<A>& out, cudaStream_t stream);
};

template <typename S>
cudaError_t RefineKernels<S>::refine(
    const AnyFeatureMap& features, const Attentions<A>& in, const AnyFeatureMap& refined, cudaStream_t stream) {
  return for_map(refined, [&](auto last) {
    refine_kernel<S, A, decltype(last)::value><<<map_blocks(features), kMapThreads, 0, stream>>>(
        as_map<const S>(features), in, as_map<S>(refined));
  });
}

template <typename S>
cudaError_t RefineKernels<S>::refine_backward(
    const AnyFeatureMap& features, const Attentions<A>& in, const AnyFeatureMap& refined_grad,
    const AnyFeatureMap& features_grad, const AttentionGrads<A>& out, A* partial, cudaStream_t stream) {
  return for_map(features_grad, [&](auto last) {
    refine_backward_kernel<S, A, decltype(last)::value><<<map_blocks(features), kMapThreads, 0, stream>>>(
        as_map<const S>(features), in, as_map<const S>(refined_grad), as_map<S>(features_grad), out.channel, partial);
    const int64_t size = features.batch * features.positions;
    const unsigned blocks = static_cast<unsigned>((size + kMapThreads - 1) / kMapThreads);
    add_parts_kernel<<<blocks, kMapThreads, 0, stream>>>(
        static_cast<const A*>(partial), map_parts(features.channels), features.positions, size, out.spatial);
  });
}

template <typename S>
cudaError_t RefineKernels<S>::adversary(
    const AnyFeatureMap& features, const AnyFeatureMap& refined, const AdversaryInput<A>& in, const Adversary<A>& out,
    A* partial, cudaStream_t stream) {
  A* const partial_features = partial + features.batch * map_parts(features.channels) * features.positions;
  const auto add_up = [&](const AnyFeatureMap& map, const A* weights, A* to) {
    return for_map(map, [&](auto last) {
      channel_sums_kernel<S, A, decltype(last)::value>
          <<<map_blocks(map), kMapThreads, 0, stream>>>(as_map<const S>(map), weights, to);
    });
  };
  cudaError_t status = add_up(refined, nullptr, partial);
  if (status == cudaSuccess) status = add_up(features, in.rows, partial_features);
  if (status != cudaSuccess || features.batch == 0) return status;
  adversary_kernel<<<static_cast<unsigned>(features.batch), kMapThreads, 0, stream>>>(
      static_cast<const A*>(partial), static_cast<const A*>(partial_features), features.channels, features.positions,
      in, out);
  return cudaGetLastError();
}

template <typename S>
cudaError_t RefineKernels<S>::adversary_backward(
    const AnyFeatureMap& features, const AdversaryInput<A>& in, const AdversarySaved<A>& saved,
    const AnyFeatureMap& features_grad, const AdversaryInputGrad<A>& out, cudaStream_t stream) {
  return for_map(features_grad, [&](auto last) {
    adversary_backward_kernel<S, A, decltype(last)::value><<<map_blocks(features), kMapThreads, 0, stream>>>(
        as_map<const S>(features), in, saved, as_map<S>(features_grad), out);
  });
}

}  // namespace dan_fast
