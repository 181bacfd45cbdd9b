// The kernels of refine.h and their launches. Each file of ../instantiations compiles those of one type of map, so that
// they do it at the same time.
#pragma once

#include <climits>
#include <type_traits>

#include "../../cuda/element.cuh"
#include "adversary.cuh"

namespace dan_fast {

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kMapThreads)
    refine_kernel(const FeatureMap<const S> features, const Attentions<A> in, const FeatureMap<S> refined) {
  __shared__ MapWeights<A> shared;
  refine_block<S, A, kChannelsLast>(features, in, refined, shared);
}

template <typename S, typename A, bool kChannelsLast>
__global__ void __launch_bounds__(kMapThreads) refine_backward_kernel(
    const FeatureMap<const S> features, const Attentions<A> in, const FeatureMap<const S> grad_refined,
    const FeatureMap<S> grad_features, A* grad_channel_attention, A* partial) {
  __shared__ MapShared<A> shared;
  refine_backward_block<S, A, kChannelsLast>(
      features, in, grad_refined, grad_features, grad_channel_attention, partial, shared);
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
    const FeatureMap<S> grad_features, const AdversaryInputGrad<A> out) {
  __shared__ MapShared<A> shared;
  adversary_backward_block<S, A, kChannelsLast>(features, in, saved, grad_features, out, shared);
}

// launch(std::true_type) where the channels of the map are adjacent, std::false_type where the positions are, unless
// there is nothing to do.
template <typename S, typename Launch>
cudaError_t for_map(const FeatureMap<S>& map, const Launch& launch) {
  const int64_t blocks = map.batch * map_parts(map.channels);
  if (blocks > INT_MAX || (map.position_stride != 1 && map.channel_stride != 1)) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  map.position_stride == 1 ? launch(std::false_type{}) : launch(std::true_type{});
  return cudaGetLastError();
}

template <typename S>
unsigned map_blocks(const FeatureMap<S>& map) {
  return static_cast<unsigned>(map.batch * map_parts(map.channels));
}

template <typename S>
int RefineCuda<S>::refine(
    const FeatureMap<const S>& features, const Attentions<A>& in, const FeatureMap<S>& refined, void* stream) {
  using E = Element<S>;
  return for_map(refined, [&](auto last) {
    refine_kernel<E, A, decltype(last)::value>
        <<<map_blocks(features), kMapThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            features.template as<const E>(), in, refined.template as<E>());
  });
}

template <typename S>
int RefineCuda<S>::refine_backward(
    const FeatureMap<const S>& features, const Attentions<A>& in, const FeatureMap<const S>& grad_refined,
    const FeatureMap<S>& grad_features, const AttentionGrads<A>& out, A* partial, void* stream) {
  using E = Element<S>;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  return for_map(grad_features, [&](auto last) {
    refine_backward_kernel<E, A, decltype(last)::value><<<map_blocks(features), kMapThreads, 0, queue>>>(
        features.template as<const E>(), in, grad_refined.template as<const E>(), grad_features.template as<E>(),
        out.channel, partial);
    const int64_t size = features.batch * features.positions;
    const unsigned blocks = static_cast<unsigned>((size + kMapThreads - 1) / kMapThreads);
    add_parts_kernel<<<blocks, kMapThreads, 0, queue>>>(
        static_cast<const A*>(partial), map_parts(features.channels), features.positions, size, out.spatial);
  });
}

template <typename S>
int RefineCuda<S>::adversary(
    const FeatureMap<const S>& features, const FeatureMap<const S>& refined, const AdversaryInput<A>& in,
    const Adversary<A>& out, A* partial, void* stream) {
  using E = Element<S>;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  A* const partial_features = partial + features.batch * map_parts(features.channels) * features.positions;
  const auto add_up = [&](const FeatureMap<const S>& map, const A* weights, A* to) {
    return for_map(map, [&](auto last) {
      channel_sums_kernel<E, A, decltype(last)::value>
          <<<map_blocks(map), kMapThreads, 0, queue>>>(map.template as<const E>(), weights, to);
    });
  };
  cudaError_t status = add_up(refined, nullptr, partial);
  if (status == cudaSuccess) status = add_up(features, in.rows, partial_features);
  if (status != cudaSuccess || features.batch == 0) return status;
  adversary_kernel<<<static_cast<unsigned>(features.batch), kMapThreads, 0, queue>>>(
      static_cast<const A*>(partial), static_cast<const A*>(partial_features), features.channels, features.positions,
      in, out);
  return cudaGetLastError();
}

template <typename S>
int RefineCuda<S>::adversary_backward(
    const FeatureMap<const S>& features, const AdversaryInput<A>& in, const AdversarySaved<A>& saved,
    const FeatureMap<S>& grad_features, const AdversaryInputGrad<A>& out, void* stream) {
  using E = Element<S>;
  return for_map(grad_features, [&](auto last) {
    adversary_backward_kernel<E, A, decltype(last)::value>
        <<<map_blocks(features), kMapThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            features.template as<const E>(), in, saved, grad_features.template as<E>(), out);
  });
}

}  // namespace dan_fast
