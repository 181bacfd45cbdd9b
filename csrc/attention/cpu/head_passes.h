// The passes of the attention head on the CPU, for some samples of a batch at a time; head.h says what goes in and
// out. Kernels exist once per instruction set, see ../../cpu/isa.h.
//
// A sample's results depend neither on the range that it is part of nor on the instruction set: sums have a fixed
// order, and nothing is contracted.
#pragma once

#include "../../common/scalar.h"
#include "../../cpu/isa.h"
#include "../head.h"

namespace dan_fast {

// What a sample leaves for the gradients of the weights, P positions and h hidden units: they are sums of outer
// products over the batch.
template <typename A>
struct SpatialGradients {
  A* gates;   // (B, 3, P) gradients of A, B and C before the sigmoid
  A* hidden;  // (B, 6, h) relu(ws1 g), relu(ws1 m), relu(ws3 g) and their gradients before the relu
};

#define DAN_FAST_DECLARE_HEAD(isa)                                                                                   \
  namespace isa {                                                                                                    \
  template <typename S, typename A>                                                                                  \
  void head_pool(const FeatureMap<const S>& features, const Pooled<A>& out, int64_t first, int64_t last);            \
  template <typename S, typename A>                                                                                  \
  void head_attend(const FeatureMap<const S>& features, const AttendInput<A>& in, const Attended<A>& out,            \
                   int64_t first, int64_t last);                                                                     \
  /* All of `out` but the gradients of the weights; attended is not read: its pass costs nothing beside the others. */ \
  template <typename S, typename A>                                                                                  \
  void head_attend_backward(const FeatureMap<const S>& features, const AttendInput<A>& in,                           \
                            const Attended<const A>& saved, const AttendedGrad<A>& grad,                             \
                            const AttendInputGrad<A>& out, const SpatialGradients<A>& parts, int64_t first,          \
                            int64_t last);                                                                           \
  /* Columns [first, last) of ws1 and ws3, rows [first, last) of ws2 and ws4. */                                     \
  template <typename A>                                                                                              \
  void head_weights_backward(const Attended<const A>& saved, const SpatialGradients<A>& parts, int64_t batch,        \
                             int64_t positions, int64_t hidden, const AttendInputGrad<A>& out, int64_t first,        \
                             int64_t last);                                                                          \
  /* grad = (grad + more) gate (1 - gate), the sigmoid's share of it; `more` may be null. */                          \
  template <typename A>                                                                                              \
  void head_logits_backward(const A* gate, const A* more, A* grad, int64_t size);                                    \
  template <typename S, typename A>                                                                                  \
  void head_features_backward(const FeatureMap<S>& grad, const FeaturesGradInput<A>& in, int64_t first, int64_t last); \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_HEAD)
#undef DAN_FAST_DECLARE_HEAD

}  // namespace dan_fast
