// FP and FN of Eq. (14) for a batch of samples, by selection instead of a sort. The order of evaluations stands here;
// false_sets_cpu_isa.cpp and false_sets.cuh hold the loops. Plain C++17.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"
#include "rules.h"

namespace dan_fast {

// A floating format as its bits: a sign before a magnitude; a magnitude above `kInfinity` is NaN.
struct Binary64 {
  using Bits = uint64_t;
  using Key = uint64_t;
  static constexpr int kKeyBits = 64;
  static constexpr Key kInfinity = 0x7ff0000000000000u;
};
struct Binary32 {
  using Bits = uint32_t;
  using Key = uint32_t;
  static constexpr int kKeyBits = 32;
  static constexpr Key kInfinity = 0x7f800000u;
};
struct Binary16 {
  using Bits = uint16_t;
  using Key = uint32_t;
  static constexpr int kKeyBits = 16;
  static constexpr Key kInfinity = 0x7c00u;
};
struct Brain16 {
  using Bits = uint16_t;
  using Key = uint32_t;
  static constexpr int kKeyBits = 16;
  static constexpr Key kInfinity = 0x7f80u;
};

// A number below 2^kKeyBits that grows with the value, as torch.sort has it: -0 equals 0, NaN is above all and equals
// NaN. Never 0, which is left for empty slots.
template <typename Format>
DAN_FAST_HD typename Format::Key value_key(typename Format::Bits bits) {
  using Key = typename Format::Key;
  const Key sign = Key(1) << (Format::kKeyBits - 1);
  const Key magnitude = bits & (sign - 1);
  const Key ordered = (bits & sign) != 0 ? sign - magnitude : sign + magnitude;
  return magnitude > Format::kInfinity ? sign + (sign - 1) : ordered;
}

// Every array is contiguous.
struct FalseSets {
  int64_t rows, slots;           // B, s; s < 2^31
  const void* evaluation;        // (B, s) Format::Bits
  const int64_t* labels;         // (s,) -1: empty
  const int64_t* pseudo_labels;  // (B,)
  uint8_t* false_positive;       // (B, s) out
  uint8_t* false_negative;       // (B, s) out
};

// Rows [first, last).
#define DAN_FAST_DECLARE_FALSE_SETS(isa)                                        \
  namespace isa {                                                               \
  template <typename Format>                                                    \
  void find_false_sets(const FalseSets& sets, int64_t first, int64_t last);     \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_FALSE_SETS)
#undef DAN_FAST_DECLARE_FALSE_SETS

}  // namespace dan_fast
