// What the bindings see of refine.h on CUDA; see head_launch.h.
#pragma once

#include "../refine.h"

namespace dan_fast {

// Channels of a block; several blocks take a sample and each leaves sums over its own.
constexpr int64_t kMapChannels = 64;

DAN_FAST_HD int64_t map_parts(int64_t channels) { return (channels + kMapChannels - 1) / kMapChannels; }

// For maps of S. All launch on `stream` (a cudaStream_t) and do not wait. They return a cudaError_t. Maps of one call
// have the same numbers adjacent, those of `adversary` excepted. `partial` is memory of the caller's: (B, map_parts, P)
// numbers, (2, B, map_parts, P) of `adversary`.
template <typename S>
struct RefineCuda {
  using A = Statistic<S>;
  static int refine(
      const FeatureMap<const S>& features, const Attentions<A>& in, const FeatureMap<S>& refined, void* stream);
  static int refine_backward(
      const FeatureMap<const S>& features, const Attentions<A>& in, const FeatureMap<const S>& grad_refined,
      const FeatureMap<S>& grad_features, const AttentionGrads<A>& out, A* partial, void* stream);
  static int adversary(
      const FeatureMap<const S>& features, const FeatureMap<const S>& refined, const AdversaryInput<A>& in,
      const Adversary<A>& out, A* partial, void* stream);
  static int adversary_backward(
      const FeatureMap<const S>& features, const AdversaryInput<A>& in, const AdversarySaved<A>& saved,
      const FeatureMap<S>& grad_features, const AdversaryInputGrad<A>& out, void* stream);
};

}  // namespace dan_fast
