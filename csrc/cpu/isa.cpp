#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(DAN_FAST_HAS_AVX2)
#include <cpuid.h>
#endif

namespace dan_fast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

#if defined(__x86_64__) && defined(DAN_FAST_HAS_AVX2)
// Not every compiler's __builtin_cpu_supports knows this name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}
#endif

Isa of_this_cpu() {
  Isa best = Isa::kBaseline;
#if defined(__x86_64__) && defined(DAN_FAST_HAS_AVX2)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && has_f16c();
  if (avx2) best = Isa::kAvx2;
#ifdef DAN_FAST_HAS_AVX512
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    best = Isa::kAvx512;
  }
#endif
#endif
  return best;
}

Isa chosen() {
  const Isa best = of_this_cpu();
  const char* cap = std::getenv("DAN_FAST_ISA");
  if (cap == nullptr || *cap == '\0') return best;
  for (const Isa set : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (cap == std::string(kNames[static_cast<int>(set)])) return std::min(set, best);
  }
  throw std::runtime_error("The environment variable DAN_FAST_ISA is '" + std::string(cap) +
                           "'; set it to baseline, avx2 or avx512, or unset it");
}

}  // namespace

Isa isa() {
  static const Isa once = chosen();
  return once;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace dan_fast
