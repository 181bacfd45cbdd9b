// What the bindings see of the CUDA scan. Plain C++, so that they compile without the CUDA headers. T is float or
// double; all pointers of the arguments, `workspace` included, are device memory of the current device.
#pragma once

#include <cstdint>

#include "scan.h"

namespace dan_fast {

struct ScanSizes {
  int64_t batch, unlabeled_batch, labeled_slots, unlabeled_slots;
};

// The bytes that either launch below needs as its workspace on the current device. Returns a cudaError_t.
template <typename T>
int scan_workspace_bytes(const ScanSizes& sizes, int64_t* bytes);

// Launch on `stream` (a cudaStream_t), without waiting, allocating or reading anything back: a CUDA graph may capture
// them. `workspace` starts on a multiple of 256 bytes and need not be cleared. Return a cudaError_t.
template <typename T>
int launch_scan_forward(const ScanInput<T>& in, const ScanOutput<T>& out, void* workspace, void* stream);

// `out` is what the forward launch wrote for the same `in`.
template <typename T>
int launch_scan_backward(
    const ScanInput<T>& in,
    const ScanOutput<T>& out,
    const ScanGradient<T>& gradient,
    void* workspace,
    void* stream);

}  // namespace dan_fast
