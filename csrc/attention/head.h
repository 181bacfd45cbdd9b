// The passes over the last feature map X that the attention head needs, Eqs. (2)-(4), without ever forming
// X' = X A_C or X'' = X' A_S: `pool`, then `attend`, and between them the two small matrix products of the bottleneck
// of channel attention. This header says what goes in and out. Plain C++17.
//
// S is what X is stored in (float, double, bfloat16, float16), A what is computed in (float, or double for double).
// A sample is a matrix of C channels by P positions: element (c, p) of sample b lies at
// features + b * sample_stride + c * channel_stride + p * position_stride, where either the positions are adjacent
// (contiguous) or the channels are (channels_last). Every other array is contiguous.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/scalar.h"

namespace dan_fast {

template <typename S>
struct FeatureMap {
  S* data;  // const for a map that is only read
  int64_t batch, channels, positions;
  int64_t sample_stride, channel_stride, position_stride;

  // The same map as one of T, a type of the same size, or void where only its sizes are read.
  template <typename T>
  FeatureMap<T> as() const {
    return {reinterpret_cast<T*>(data), batch, channels, positions, sample_stride, channel_stride, position_stride};
  }
};

// What the forward pass writes and the backward reads again: const where A is.
template <typename A>
using PeakIndex = std::conditional_t<std::is_const_v<A>, const int32_t, int32_t>;

// Spatial mean and maximum of every channel; where the first maximum is. NaN is the largest, as in torch.max.
template <typename A>
struct Pooled {
  A* mean;                  // (B, C)
  A* peak;                  // (B, C)
  PeakIndex<A>* peak_position;  // (B, C)
};

// The bottlenecks of spatial attention, h hidden units.
template <typename A>
struct SpatialWeights {
  int64_t hidden;
  const A* ws1;  // (h, P)
  const A* ws3;  // (h, P)
  const A* ws2;  // (P, h)
  const A* ws4;  // (P, h)
};

template <typename A>
struct AttendInput {
  const A* channel_attention;  // (B, C) A_C
  const A* rows;               // (B, C) the classifier's row of each label, 0 for the label -1
  const int64_t* labels;       // (B,)
  SpatialWeights<A> weights;
};

// g_p = mean over c of X'_cp, m_p = max over c of X'_cp; A, B, C = sigmoid(ws2 relu(ws1 g)), sigmoid(ws2 relu(ws1 m)),
// sigmoid(ws4 relu(ws3 g)); S_pq = softmax over q of A_p B_q; A_S = S C; A_at = g A_S; A_ad = sum over c of rows_c
// X_cp; L_aad = sum over p of sigmoid(A_at + A_ad) sigmoid(|A_at - A_ad|), 0 for the label -1.
template <typename A>
struct Attended {
  A* attended;             // (B, C) A_C,c * mean over p of X_cp A_S,p
  A* spatial_attention;    // (B, P)
  A* loss;                 // (B,) no backward pass reads it: it may be null there
  A* mean_map;             // (B, P) g
  A* peak_map;             // (B, P) m
  PeakIndex<A>* peak_channel;  // (B, P) the first channel of the maximum
  A* adversary_map;        // (B, P) A_ad
};

// Gradients of the results of `attend`.
template <typename A>
struct AttendedGrad {
  const A* attended;           // (B, C)
  const A* spatial_attention;  // (B, P)
  const A* loss;               // (B,)
};

// Gradients of what went into `attend`, X excepted: it gets its own in one pass, `FeaturesGradInput`, from these
// and from the gradients of mean and peak. The gradient of |x| at 0 is 0, of a maximum goes to the first.
template <typename A>
struct AttendInputGrad {
  A* channel_attention;  // (B, C)
  A* rows;               // (B, C)
  A* mean_map;           // (B, P)
  A* peak_map;           // (B, P)
  A* adversary_map;      // (B, P)
  A* ws1;                // (h, P) added up over the batch in a fixed order, as are the next three
  A* ws3;                // (h, P)
  A* ws2;                // (P, h)
  A* ws4;                // (P, h)
};

// dX_cp = d_attended_c A_C,c A_S,p / P + d_mean_map_p A_C,c / C + d_adversary_map_p rows_c + d_mean_c / P
//       + [c = peak_channel_p] d_peak_map_p A_C,c + [p = peak_position_c] d_peak_c.
template <typename A>
struct FeaturesGradInput {
  const A* channel_attention;     // (B, C)
  const A* rows;                  // (B, C)
  const A* spatial_attention;     // (B, P)
  const int32_t* peak_channel;    // (B, P)
  const int32_t* peak_position;   // (B, C)
  const A* grad_attended;         // (B, C)
  const A* grad_mean_map;         // (B, P)
  const A* grad_peak_map;         // (B, P)
  const A* grad_adversary_map;    // (B, P)
  const A* grad_mean;             // (B, C) of the spatial mean: by way of A_C and of `pooled` itself
  const A* grad_peak;             // (B, C)
};

// The whole head, Eqs. (2)-(4): the passes above and between them the bottleneck of channel attention,
// A_C = sigmoid(wc2 (relu(wc1 mean) + relu(wc1 peak))), whose second layer is linear and so serves both.
template <typename S, typename A>
struct HeadInput {
  FeatureMap<const S> features;
  int64_t units;          // of the bottleneck
  const A* wc1;           // (units, C)
  const A* wc2;           // (C, units)
  int64_t classes;
  const A* cam_weight;    // (classes, C)
  const int64_t* labels;  // (B,) -1: unknown
  SpatialWeights<A> spatial;

  // As FeatureMap::as.
  template <typename T>
  HeadInput<T, A> as() const {
    return {features.template as<const T>(), units, wc1, wc2, classes, cam_weight, labels, spatial};
  }
};

template <typename A>
struct HeadOutput {
  Pooled<A> pooled;
  A* of_mean;            // (B, units) wc1 mean
  A* of_peak;            // (B, units) wc1 peak
  A* channel_attention;  // (B, C)
  Attended<A> attended;
};

// Gradients of the results of the whole head.
template <typename A>
struct HeadGrad {
  AttendedGrad<A> attended;
  const A* pooled;             // (B, C) or null: zero
  const A* channel_attention;  // (B, C) or null: zero
};

template <typename S, typename A>
struct HeadInputGrad {
  FeatureMap<S> features;
  A* wc1;
  A* wc2;
  A* ws1;
  A* ws3;
  A* ws2;
  A* ws4;
  A* cam_weight;

  // As FeatureMap::as.
  template <typename T>
  HeadInputGrad<T, A> as() const {
    return {features.template as<T>(), wc1, wc2, ws1, ws3, ws2, ws4, cam_weight};
  }
};

}  // namespace dan_fast
