// What the kernels of the CUDA scan keep in the caller's workspace. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../cuda/arena.h"
#include "scan.h"

namespace dan_fast {

// The counter of the grid's barrier and the histograms of the top-n selection lie first, each on multiples of 256
// bytes: they start at 0, the rest is written before it is read.
constexpr int64_t kCounters = 64, kHistogramCounts = 3 * 256;
constexpr int64_t kClearedBytes = (kCounters + kHistogramCounts) * static_cast<int64_t>(sizeof(uint32_t));

// Totals of one block, padded to a common size.
constexpr int64_t kPartialBytes = 32;

// A thread for every slot of the larger memory, as far as so many blocks can run at once; the rest is strided.
template <typename T>
int64_t scan_blocks(const ScanInput<T>& in, int64_t threads, int64_t resident) {
  const int64_t slots = std::max<int64_t>(1, std::max(in.labeled.slots, in.unlabeled.slots));
  return std::min(resident, (slots + threads - 1) / threads);
}

template <typename T>
struct ScanWorkspace {
  uint32_t* arrived;
  uint32_t* histograms;
  void* partials[2];           // (blocks,) totals
  T* unlabeled_cosines;        // (s2,) forward: V of the sample that has arrived, before exp
  T* labeled_square_norms;     // (s1,) backward: gradient of |m_i|^2, as is the next
  T* unlabeled_square_norms;   // (s2,)
  T* labeled_evaluations;      // (s1,) backward: gradient of W^e, as is the next
  T* unlabeled_evaluations;    // (s2,)
  T* gates;                    // (blocks, 2) backward: what the slots of a block add to the gradients of both gates
  T* gram;                     // (blocks, Q, Q) backward: the same for the Gram matrix

  // Lays it out from `base`, which may be null, and returns the bytes it takes.
  int64_t lay_out(void* base, const ScanInput<T>& in, int64_t blocks, bool backward) {
    Arena arena(base);
    const int64_t rows = in.batch + in.unlabeled_batch;
    *this = {};
    arrived = arena.take<uint32_t>(kCounters);
    histograms = arena.take<uint32_t>(kHistogramCounts);
    for (void*& partial : partials) partial = arena.take<char>(blocks * kPartialBytes);
    if (backward) {
      labeled_square_norms = arena.take<T>(in.labeled.slots);
      unlabeled_square_norms = arena.take<T>(in.unlabeled.slots);
      labeled_evaluations = arena.take<T>(in.labeled.slots);
      unlabeled_evaluations = arena.take<T>(in.unlabeled.slots);
      gates = arena.take<T>(2 * blocks);
      gram = arena.take<T>(blocks * rows * rows);
    } else {
      unlabeled_cosines = arena.take<T>(in.unlabeled.slots);
    }
    return arena.bytes();
  }
};

}  // namespace dan_fast
