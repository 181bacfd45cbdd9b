// What the kernels of the CUDA scan keep in the caller's workspace. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "scan_launch.h"

namespace dan_fast {

// The counter of the grid's barrier and the histograms of the top-n selection lie first: they start at 0, the rest
// is written before it is read.
constexpr int64_t kCounterBytes = 256;
constexpr int64_t kClearedBytes = kCounterBytes + 3 * 256 * static_cast<int64_t>(sizeof(uint32_t));

// Totals of one block, padded to a common size.
constexpr int64_t kPartialBytes = 32;

// A thread for every slot of the larger memory, as far as so many blocks can run at once; the rest is strided.
inline int64_t scan_blocks(const ScanSizes& sizes, int64_t threads, int64_t resident) {
  const int64_t slots = std::max<int64_t>(1, std::max(sizes.labeled_slots, sizes.unlabeled_slots));
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
  int64_t lay_out(void* base, const ScanSizes& sizes, int64_t blocks, bool backward) {
    char* const start = static_cast<char*>(base);
    int64_t bytes = 0;
    const auto take = [&](int64_t size) {
      void* const at = start == nullptr ? nullptr : start + bytes;
      bytes += (size + 255) / 256 * 256;
      return at;
    };
    const auto take_array = [&](int64_t size) {
      return static_cast<T*>(take(size * static_cast<int64_t>(sizeof(T))));
    };
    const int64_t rows = sizes.batch + sizes.unlabeled_batch;
    *this = {};
    char* const cleared = static_cast<char*>(take(kClearedBytes));
    arrived = reinterpret_cast<uint32_t*>(cleared);
    histograms = cleared == nullptr ? nullptr : reinterpret_cast<uint32_t*>(cleared + kCounterBytes);
    for (void*& partial : partials) partial = take(blocks * kPartialBytes);
    if (backward) {
      labeled_square_norms = take_array(sizes.labeled_slots);
      unlabeled_square_norms = take_array(sizes.unlabeled_slots);
      labeled_evaluations = take_array(sizes.labeled_slots);
      unlabeled_evaluations = take_array(sizes.unlabeled_slots);
      gates = take_array(2 * blocks);
      gram = take_array(blocks * rows * rows);
    } else {
      unlabeled_cosines = take_array(sizes.unlabeled_slots);
    }
    return bytes;
  }
};

}  // namespace dan_fast
