// The types in which numbers are stored, and the one in which is computed with them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dan_fast {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What sums and other statistics of numbers stored in S have; in signatures A.
template <typename S>
using Statistic = std::conditional_t<std::is_same_v<S, double>, double, float>;

// macro(S, A) for every storage type: instantiations.
#define DAN_FAST_EACH_STORAGE(macro) \
  macro(double, double) macro(float, float) macro(BFloat16, float) macro(Float16, float)

}  // namespace dan_fast
