// The scan: all samples of a batch through both memories, in score space. This header says what goes in and out, on the
// CPU and on CUDA; ../rules.h holds what happens to a slot. Plain C++17.
//
// Within a batch a slot holds `m_i = kept_i m_i(0) + sum_u held_ui k_u`, so its score with key q is
// `<k_q, m_i> = kept_i <k_q, m_i(0)> + sum_u held_ui <k_q, k_u>`: base scores and the Gram matrix of the keys are all
// that a scan needs of the keys and of the memory. T is float or double; every array is contiguous.
#pragma once

#include <cstdint>

#include "../../cpu/isa.h"
#include "../../cpu/parallel.h"
#include "../rules.h"

namespace dan_fast {

// One memory before the batch.
template <typename T>
struct MemoryBefore {
  int64_t slots;
  const T* square_norms;  // (s,) |m_i|^2
  const T* usage;         // (s,)
  const T* evaluation;    // (s,) W^e of the last write; of an empty slot it is ignored
  const int64_t* labels;  // (s,) -1: empty
  const int64_t* sample_ids;  // (s,)
  const int64_t* least_used;  // ()
};

// The memory after the batch of `steps` writes.
template <typename T>
struct MemoryAfter {
  T* square_norms;      // (s,)
  T* usage;             // (s,)
  T* evaluation;        // (s,) after the last write; as it was where there is none
  T* kept;              // (s,) 1, or 0 where the slot was cleared
  T* held;              // (steps, s) share of key u that slot i still holds
  int64_t* labels;      // (s,)
  int64_t* sample_ids;  // (s,)
  int64_t* least_used;  // ()
};

// What each step leaves for the backward pass, (steps, s) each.
template <typename T>
struct WriteRecord {
  T* before;        // <k_t, m_i> when sample t arrives, before anything is cleared
  T* weights;       // W^w of Eq. (8)
  T* evaluation;    // W^e after the write, 0 where empty
  T* square_norms;  // |m_i|^2 after the write
  uint8_t* events;  // bits of Event
};

// B labelled keys come first, B' unlabelled ones after them; all of them are the Q = B + B' rows of `scores` and
// `gram`.
template <typename T>
struct ScanInput {
  int64_t batch, unlabeled_batch;  // B, B'
  const T* scores;                 // (Q, s1) <k_q, m_i(0)> of M
  const T* unlabeled_scores;       // (B', s2) of M'
  const T* gram;                   // (Q, Q) <k_q, k_u>; only the lower triangle, diagonal included, is read
  const T* gates;                  // (3,) raw alpha, raw alpha', beta as it is used
  const int64_t* labels;           // (B,)
  const int64_t* sample_ids;       // (B',)
  MemoryBefore<T> labeled, unlabeled;
  T decay, decay_unlabeled;
  bool scalar_keys;  // d = 1
};

// A batch with a fault changes nothing: the memories come out as they went in (held 0, kept 1), the loss is NaN, every
// pseudo label -1. If M is wholly empty when the unlabelled samples come (B = 0), all of them are skipped: pseudo
// labels -1, loss 0, M' as it was. The same memory-side values (record and retrieval arrays) are then zero.
template <typename T>
struct ScanOutput {
  T* loss;                 // () L_lde, mean over B'; 0 if B' = 0
  int64_t* pseudo_labels;  // (B',)
  int32_t* fault;          // () bits of Fault
  MemoryAfter<T> labeled, unlabeled;
  WriteRecord<T> labeled_record, unlabeled_record;  // steps B and B'
  T* retrieval_scores;                              // (B', s1) <k'_b, m_i> after all labelled writes
  T* retrieval_sums;  // (B', 4) exp(cos) added over the slots of P, over those of N; how many slots P, N
  T* false_sums;      // (B', 2) exp(cos) of V added over FP, over FN; both 0 without sets
};

// All 0 where the loss is a constant: a fault, B' = 0, every sample skipped.
template <typename T>
struct ScanGradient {
  const T* loss;        // () in
  T* scores;            // (Q, s1) out, as are the rest
  T* unlabeled_scores;  // (B', s2)
  T* gram;              // (Q, Q) with respect to the entries read: 0 above the diagonal
  T* gates;             // (3,)
};

// Every element of the outputs is written. Results have the same bits whatever the number of threads and the
// instruction set.
#define DAN_FAST_DECLARE_SCAN(isa)                                                                  \
  namespace isa {                                                                                   \
  template <typename T>                                                                             \
  void scan_forward(const ScanInput<T>& in, const ScanOutput<T>& out, ParallelFor parallel);        \
  template <typename T>                                                                             \
  void scan_backward(const ScanInput<T>& in, const ScanOutput<T>& out, const ScanGradient<T>& grad, \
                     ParallelFor parallel);                                                         \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_SCAN)
#undef DAN_FAST_DECLARE_SCAN

// On CUDA; all pointers are device memory of the current device. The bytes that either launch needs as its workspace,
// which starts on a multiple of 256 bytes and need not be cleared. Returns a cudaError_t, as do the launches.
template <typename T>
int scan_workspace_bytes(const ScanInput<T>& in, int64_t* bytes);

// Launch on `stream` (a cudaStream_t), without waiting, allocating or reading anything back: a CUDA graph may capture
// them. The backward's `out` is what the forward launch wrote for the same `in`.
template <typename T>
int launch_scan_forward(const ScanInput<T>& in, const ScanOutput<T>& out, void* workspace, void* stream);
template <typename T>
int launch_scan_backward(
    const ScanInput<T>& in, const ScanOutput<T>& out, const ScanGradient<T>& gradient, void* workspace, void* stream);

}  // namespace dan_fast
