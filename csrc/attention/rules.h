// What happens to one position, hidden unit or pair of positions in the attention head, Eqs. (3)-(4); once for all
// devices, which differ in how they walk the elements and add them up. head.h says what the letters mean.
#pragma once

#include <cmath>

#include "../common/math.h"

namespace dan_fast {

// Whether `candidate` takes the place of the maximum so far: the first of several, and of several NaN. Begin with
// minus infinity at index 0.
template <typename T>
DAN_FAST_HD bool takes_the_lead(T candidate, T best) {
  return !(candidate <= best) && best == best;
}

// NaN stays, here and in the gradient, as in PyTorch.
template <typename T>
DAN_FAST_HD T relu(T x) {
  return x <= T(0) ? T(0) : x;
}

template <typename T>
DAN_FAST_HD T relu_backward(T value, T grad) {
  return value <= T(0) ? T(0) : grad;
}

// exp(A_p B_q), the softmax of S before it is normalised; A_p and B_q are sigmoids, so no maximum need be subtracted:
// S_pq = affinity(A_p, B_q) / sum over q of affinity(A_p, B_q).
template <typename T>
DAN_FAST_HD T affinity(T a, T b) {
  return exp_of_cosine(a * b);
}

// Gradient of A_p B_q, for A_S,p = sum over q of S_pq C_q, from S_pq and the gradient of A_S,p: its sum over q with B_q
// is that of A_p, its sum over p with A_p that of B_q. The gradient of C_q is the sum over p of S_pq grad_p.
template <typename T>
DAN_FAST_HD T affinity_backward(T s, T c, T spatial_attention, T grad) {
  return s * grad * (c - spatial_attention);
}

// One position's term of L_aad; refined = A_at = g A_S.
template <typename T>
DAN_FAST_HD T adversary_term(T refined, T adversary) {
  return sigmoid(refined + adversary) * sigmoid(std::abs(refined - adversary));
}

template <typename T>
struct AdversaryGrad {
  T refined, adversary;
};

template <typename T>
DAN_FAST_HD AdversaryGrad<T> adversary_term_backward(T refined, T adversary, T grad) {
  const T difference = refined - adversary;
  const T sum_sigmoid = sigmoid(refined + adversary), difference_sigmoid = sigmoid(std::abs(difference));
  const T sign = difference > T(0) ? T(1) : difference < T(0) ? T(-1) : T(0);
  const T grad_sum = grad * sigmoid_backward(sum_sigmoid) * difference_sigmoid;
  const T grad_difference = grad * sum_sigmoid * sigmoid_backward(difference_sigmoid) * sign;
  return {grad_sum + grad_difference, grad_sum - grad_difference};
}

// dX at one element but for the two maxima: attended = d_attended_c A_C,c / P, mean = d_mean_c / P,
// mean_map = d_mean_map_p / C.
template <typename T>
DAN_FAST_HD T grad_feature(
    T attended, T channel_attention, T row, T mean, T spatial_attention, T mean_map, T adversary_map) {
  return attended * spatial_attention + channel_attention * mean_map + row * adversary_map + mean;
}

}  // namespace dan_fast
