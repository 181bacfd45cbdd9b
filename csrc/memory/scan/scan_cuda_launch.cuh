// The kernels of the CUDA scan and their launches; scan_cuda_float.cu and scan_cuda_double.cu each compile one type, so
// that they do it at the same time.
#pragma once

#include <cuda_runtime.h>

#include "../../cuda/cooperative.cuh"
#include "scan_cuda_backward.cuh"
#include "scan_cuda_forward.cuh"

namespace dan_fast {

constexpr int kScanThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kScanThreads, 1)
    scan_forward_kernel(const ScanInput<T> in, const ScanOutput<T> out, const ScanWorkspace<T> workspace) {
  __shared__ ForwardShared<T> shared;
  ForwardScan<T>(in, out, workspace, shared).run();
}

template <typename T>
__global__ void __launch_bounds__(kScanThreads, 1) scan_backward_kernel(
    const ScanInput<T> in, const ScanOutput<T> out, const ScanGradient<T> gradient,
    const ScanWorkspace<T> workspace) {
  __shared__ BackwardShared<T> shared;
  BackwardScan<T>(in, out, gradient, workspace, shared).run();
}

template <typename T>
const void* scan_kernel(bool backward) {
  return backward ? reinterpret_cast<const void*>(scan_backward_kernel<T>)
                  : reinterpret_cast<const void*>(scan_forward_kernel<T>);
}

template <typename T>
cudaError_t prepare(
    const ScanInput<T>& in, bool backward, void* memory, int64_t* blocks, ScanWorkspace<T>* workspace, int64_t* bytes) {
  static ResidentBlocks resident[2];
  const cudaError_t status = resident[backward].ask(scan_kernel<T>(backward), kScanThreads, 0, blocks);
  if (status != cudaSuccess) return status;
  *blocks = scan_blocks(in, kScanThreads, *blocks);
  *bytes = workspace->lay_out(memory, in, *blocks, backward);
  return cudaSuccess;
}

template <typename T>
cudaError_t launch(
    bool backward, const ScanWorkspace<T>& workspace, int64_t blocks, void** arguments, void* stream) {
  return launch_cooperative(
      scan_kernel<T>(backward), blocks, kScanThreads, 0, arguments, workspace.arrived, kClearedBytes,
      static_cast<cudaStream_t>(stream));
}

template <typename T>
int scan_workspace_bytes(const ScanInput<T>& in, int64_t* bytes) {
  *bytes = 0;
  for (const bool backward : {false, true}) {
    int64_t blocks = 0, needed = 0;
    ScanWorkspace<T> workspace;
    const cudaError_t status = prepare(in, backward, nullptr, &blocks, &workspace, &needed);
    if (status != cudaSuccess) return status;
    *bytes = std::max(*bytes, needed);
  }
  return cudaSuccess;
}

template <typename T>
int launch_scan_forward(const ScanInput<T>& in, const ScanOutput<T>& out, void* memory, void* stream) {
  int64_t blocks = 0, bytes = 0;
  ScanWorkspace<T> workspace;
  const cudaError_t status = prepare(in, false, memory, &blocks, &workspace, &bytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {const_cast<ScanInput<T>*>(&in), const_cast<ScanOutput<T>*>(&out), &workspace};
  return launch(false, workspace, blocks, arguments, stream);
}

template <typename T>
int launch_scan_backward(
    const ScanInput<T>& in, const ScanOutput<T>& out, const ScanGradient<T>& gradient, void* memory, void* stream) {
  int64_t blocks = 0, bytes = 0;
  ScanWorkspace<T> workspace;
  const cudaError_t status = prepare(in, true, memory, &blocks, &workspace, &bytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {
      const_cast<ScanInput<T>*>(&in), const_cast<ScanOutput<T>*>(&out), const_cast<ScanGradient<T>*>(&gradient),
      &workspace};
  return launch(true, workspace, blocks, arguments, stream);
}

// What a file of one type holds.
#define DAN_FAST_SCAN_LAUNCHES(T)                                                             \
  template int scan_workspace_bytes(const ScanInput<T>&, int64_t*);                           \
  template int launch_scan_forward(const ScanInput<T>&, const ScanOutput<T>&, void*, void*);  \
  template int launch_scan_backward(                                                          \
      const ScanInput<T>&, const ScanOutput<T>&, const ScanGradient<T>&, void*, void*);

}  // namespace dan_fast
