// X'' = X A_C A_S and the attention adversary of two given maps, Eqs. (3)-(4): for callers that need X'' itself, which
// the attention head never forms. This header says what goes in and out; head.h says what the letters mean. Plain
// C++17.
#pragma once

#include "head.h"
#include "rules.h"

namespace dan_fast {

// An element of X''; the gradient of X is that of X'' times the same factors.
template <typename T>
DAN_FAST_HD T refine(T x, T channel_attention, T spatial_attention) {
  return x * channel_attention * spatial_attention;
}

template <typename A>
struct Attentions {
  const A* channel;  // (B, C) A_C
  const A* spatial;  // (B, P) A_S
};

template <typename A>
struct AttentionGrads {
  A* channel;  // (B, C) sum over p of X_cp A_S,p dX''_cp
  A* spatial;  // (B, P) sum over c of X_cp A_C,c dX''_cp
};

// A_at,p = mean over c of X''_cp; A_ad,p = sum over c of rows_c X_cp, 0 for the label -1, as is L_aad.
template <typename A>
struct AdversaryInput {
  const A* rows;          // (B, C) the classifier's row of each label
  const int64_t* labels;  // (B,)
};

template <typename A>
struct Adversary {
  A* loss;           // (B,)
  A* refined_map;    // (B, P) A_at
  A* adversary_map;  // (B, P) A_ad
};

// What the forward pass left, and the gradients of its results.
template <typename A>
struct AdversarySaved {
  const A* refined_map;         // (B, P)
  const A* adversary_map;       // (B, P)
  const A* grad_loss;           // (B,)
  const A* grad_refined_map;    // (B, P)
  const A* grad_adversary_map;  // (B, P)
};

// dX_cp = rows_c d_A_ad,p; that of X'' is the same in every channel, d_A_at,p / C, and is not written out.
template <typename A>
struct AdversaryInputGrad {
  A* rows;         // (B, C)
  A* refined_map;  // (B, P) d_A_at, the loss's share included
};

// Gradients of both maps at one position, whatever came back to them included.
template <typename A>
DAN_FAST_HD AdversaryGrad<A> grad_adversary_maps(
    const AdversarySaved<A>& in, bool labelled, int64_t sample, int64_t at) {
  if (!labelled) return {in.grad_refined_map[at], A(0)};
  const AdversaryGrad<A> term = adversary_term_backward(in.refined_map[at], in.adversary_map[at], in.grad_loss[sample]);
  return {term.refined + in.grad_refined_map[at], term.adversary + in.grad_adversary_map[at]};
}

}  // namespace dan_fast
