// The passes of refine.h on the CPU, for some samples of a batch at a time. Kernels exist once per instruction set, see
// ../../cpu/isa.h.
//
// All maps of one call of refine, refine_backward or adversary_backward have the same numbers adjacent. A sample's
// results depend neither on the range that it is part of nor on the instruction set.
#pragma once

#include "../../common/scalar.h"
#include "../../cpu/isa.h"
#include "../refine.h"

namespace dan_fast {

#define DAN_FAST_DECLARE_REFINE(isa)                                                                                \
  namespace isa {                                                                                                   \
  template <typename S, typename A>                                                                                 \
  void refine_map(const FeatureMap<const S>& features, const Attentions<A>& in, const FeatureMap<S>& refined,       \
                  int64_t first, int64_t last);                                                                     \
  template <typename S, typename A>                                                                                 \
  void refine_map_backward(const FeatureMap<const S>& features, const Attentions<A>& in,                            \
                           const FeatureMap<const S>& grad_refined, const FeatureMap<S>& grad_features,             \
                           const AttentionGrads<A>& out, int64_t first, int64_t last);                              \
  template <typename S, typename A>                                                                                 \
  void adversary(const FeatureMap<const S>& features, const FeatureMap<const S>& refined, const AdversaryInput<A>& in, \
                 const Adversary<A>& out, int64_t first, int64_t last);                                             \
  template <typename S, typename A>                                                                                 \
  void adversary_backward(const FeatureMap<const S>& features, const AdversaryInput<A>& in,                         \
                          const AdversarySaved<A>& saved, const FeatureMap<S>& grad_features,                       \
                          const AdversaryInputGrad<A>& out, int64_t first, int64_t last);                           \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_REFINE)
#undef DAN_FAST_DECLARE_REFINE

}  // namespace dan_fast
