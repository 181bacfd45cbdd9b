// Kernels compiled once per CPU instruction set, and which of them the running CPU takes. Plain C++17.
//
// setup.py compiles every `*_isa.cpp` once for each set that the compiler knows, with DAN_FAST_ISA as the set's name:
// baseline (no flag; the only one off x86-64), avx2 (with FMA, F16C, BMI2) and avx512 (F, BW, DQ, VL). Such a file
// keeps its kernels in `namespace dan_fast::DAN_FAST_ISA` and all else in an unnamed namespace inside it. Its header
// declares the kernels for all sets, and callers ask for the one to run:
//
//   #define DAN_FAST_DECLARE_SUM(isa) namespace isa { float sum(const float* x, int64_t size); }
//   DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_SUM)         // inside namespace dan_fast
//   const float total = DAN_FAST_KERNEL(sum)(x, size);
//
// These files are compiled without contracting a * b + c into one rounding, without errno and without floating-point
// traps. An inline function of a header that several sets share is linked in its baseline form where it is not inlined.
#pragma once

// A file compiled by hand, without setup.py, is baseline.
#ifndef DAN_FAST_ISA
#define DAN_FAST_ISA baseline
#endif

// setup.py defines DAN_FAST_HAS_AVX2 and DAN_FAST_HAS_AVX512 for all files where it compiles those sets.
#ifdef DAN_FAST_HAS_AVX2
#define DAN_FAST_IF_AVX2(...) __VA_ARGS__
#else
#define DAN_FAST_IF_AVX2(...)
#endif
#ifdef DAN_FAST_HAS_AVX512
#define DAN_FAST_IF_AVX512(...) __VA_ARGS__
#else
#define DAN_FAST_IF_AVX512(...)
#endif

#define DAN_FAST_EACH_ISA(macro) \
  macro(baseline) DAN_FAST_IF_AVX2(macro(avx2)) DAN_FAST_IF_AVX512(macro(avx512))

// The function of this name (template arguments included) in the set that the running CPU takes.
#define DAN_FAST_KERNEL(...)                                                         \
  (DAN_FAST_IF_AVX512(::dan_fast::isa() == ::dan_fast::Isa::kAvx512                  \
                          ? &::dan_fast::avx512::__VA_ARGS__ :)                      \
   DAN_FAST_IF_AVX2(::dan_fast::isa() >= ::dan_fast::Isa::kAvx2                      \
                        ? &::dan_fast::avx2::__VA_ARGS__ :) &::dan_fast::baseline::__VA_ARGS__)

namespace dan_fast {

enum class Isa : int { kBaseline, kAvx2, kAvx512 };

// The best set that is compiled in and that the running CPU has; found once. The environment variable DAN_FAST_ISA =
// baseline | avx2 | avx512 caps it, for tests and comparisons; any other value throws std::runtime_error.
Isa isa();

// "baseline", "avx2" or "avx512".
const char* isa_name();

}  // namespace dan_fast
