// What the bindings see of refine.h on CUDA; see head_launch.h.
#pragma once

#include "head_launch.h"
#include "refine.h"

namespace dan_fast {

// Channels of a block; several blocks take a sample and each leaves sums over its own.
constexpr int64_t kMapChannels = 64;

DAN_FAST_HD int64_t map_parts(int64_t channels) { return (channels + kMapChannels - 1) / kMapChannels; }

// All launch on `stream` (a cudaStream_t) and do not wait. They return a cudaError_t. Maps of one call have the same
// numbers adjacent, those of launch_adversary excepted. `partial` is memory of the caller's: (B, map_parts, P) numbers,
// (2, B, map_parts, P) of launch_adversary.
template <typename A>
int launch_refine(const AnyFeatureMap& features, const Attentions<A>& in, const AnyFeatureMap& refined, void* stream);

template <typename A>
int launch_refine_backward(
    const AnyFeatureMap& features,
    const Attentions<A>& in,
    const AnyFeatureMap& refined_grad,
    const AnyFeatureMap& features_grad,
    const AttentionGrads<A>& out,
    A* partial,
    void* stream);

template <typename A>
int launch_adversary(
    const AnyFeatureMap& features,
    const AnyFeatureMap& refined,
    const AdversaryInput<A>& in,
    const Adversary<A>& out,
    A* partial,
    void* stream);

template <typename A>
int launch_adversary_backward(
    const AnyFeatureMap& features,
    const AdversaryInput<A>& in,
    const AdversarySaved<A>& saved,
    const AnyFeatureMap& features_grad,
    const AdversaryInputGrad<A>& out,
    void* stream);

}  // namespace dan_fast
