// The scan on the CPU: scan.h's arrays, rules.h's rules, once per instruction set. Plain C++17.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"
#include "scan.h"

namespace dan_fast {

// Runs task(context, first, last) over pieces of [0, count), none smaller than `grain` without need, maybe at the same
// time, and returns when all are done.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context);

// Every element of the outputs is written. Results have the same bits whatever the number of threads and the
// instruction set. T is float or double.
#define DAN_FAST_DECLARE_SCAN(isa)                                                          \
  namespace isa {                                                                           \
  template <typename T>                                                                     \
  void scan_forward(const ScanInput<T>& in, const ScanOutput<T>& out, ParallelFor parallel); \
  template <typename T>                                                                     \
  void scan_backward(const ScanInput<T>& in, const ScanOutput<T>& out, const ScanGradient<T>& grad, \
                     ParallelFor parallel);                                                 \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_SCAN)
#undef DAN_FAST_DECLARE_SCAN

}  // namespace dan_fast
