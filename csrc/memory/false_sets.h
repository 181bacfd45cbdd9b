// FP and FN of Eq. (14) for a batch of samples, by selection instead of a sort. The order of evaluations stands here;
// false_sets_cpu_isa.cpp and false_sets.cuh hold the loops. Plain C++17.
#pragma once

#include <cstdint>

#include "../common/math.h"
#include "../common/scalar.h"
#include "../cpu/isa.h"

namespace dan_fast {

// A floating-point format as its bits: a sign before a magnitude; a magnitude above `kInfinity` is NaN.
template <typename S>
struct FloatBits;
template <>
struct FloatBits<double> {
  using Bits = uint64_t;
  using Key = uint64_t;
  static constexpr Key kInfinity = 0x7ff0000000000000u;
};
template <>
struct FloatBits<float> {
  using Bits = uint32_t;
  using Key = uint32_t;
  static constexpr Key kInfinity = 0x7f800000u;
};
template <>
struct FloatBits<Float16> {
  using Bits = uint16_t;
  using Key = uint32_t;
  static constexpr Key kInfinity = 0x7c00u;
};
template <>
struct FloatBits<BFloat16> {
  using Bits = uint16_t;
  using Key = uint32_t;
  static constexpr Key kInfinity = 0x7f80u;
};

template <typename S>
using ValueKey = typename FloatBits<S>::Key;
template <typename S>
constexpr int kValueKeyBits = 8 * static_cast<int>(sizeof(S));

// A number below 2^kValueKeyBits that grows with the value, as torch.sort has it: -0 equals 0, NaN is above all and
// equals NaN. Never 0, which is left for empty slots.
template <typename S>
DAN_FAST_HD ValueKey<S> value_key(typename FloatBits<S>::Bits bits) {
  using Key = ValueKey<S>;
  const Key sign = Key(1) << (kValueKeyBits<S> - 1);
  const Key magnitude = bits & (sign - 1);
  const Key ordered = (bits & sign) != 0 ? sign - magnitude : sign + magnitude;
  return magnitude > FloatBits<S>::kInfinity ? sign + (sign - 1) : ordered;
}

// Every array is contiguous.
struct FalseSets {
  int64_t rows, slots;           // B, s; s < 2^31
  const void* evaluation;        // (B, s) of S
  const int64_t* labels;         // (s,) -1: empty
  const int64_t* pseudo_labels;  // (B,)
  uint8_t* false_positive;       // (B, s) out
  uint8_t* false_negative;       // (B, s) out
};

// Rows [first, last).
#define DAN_FAST_DECLARE_FALSE_SETS(isa)                                    \
  namespace isa {                                                           \
  template <typename S>                                                     \
  void find_false_sets(const FalseSets& sets, int64_t first, int64_t last); \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_FALSE_SETS)
#undef DAN_FAST_DECLARE_FALSE_SETS

// On CUDA: launches on `stream` (a cudaStream_t) of the current device and does not wait. Returns a cudaError_t.
template <typename S>
int launch_false_sets(const FalseSets& sets, void* stream);

}  // namespace dan_fast
