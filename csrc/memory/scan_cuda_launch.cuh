// The kernels of the CUDA scan and their launches; scan_cuda_float.cu and scan_cuda_double.cu each compile one type, so
// that they do it at the same time.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "scan_cuda_backward.cuh"
#include "scan_cuda_forward.cuh"
#include "scan_launch.h"

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
    const ScanInput<T> in,
    const ScanOutput<T> out,
    const ScanGradient<T> gradient,
    const ScanWorkspace<T> workspace) {
  __shared__ BackwardShared<T> shared;
  BackwardScan<T>(in, out, gradient, workspace, shared).run();
}

// How many blocks of a kernel the current device runs at once. A device is asked once: a launch then costs no query.
template <typename T>
cudaError_t resident_blocks(bool backward, int64_t* blocks) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][2];
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  int count = device < kDevices ? known[device][backward].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    int processors = 0, per_processor = 0;
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    status = backward ? cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                            &per_processor, scan_backward_kernel<T>, kScanThreads, 0)
                      : cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                            &per_processor, scan_forward_kernel<T>, kScanThreads, 0);
    if (status != cudaSuccess) return status;
    count = processors * per_processor;
    if (count == 0) return cudaErrorCooperativeLaunchTooLarge;
    if (device < kDevices) known[device][backward].store(count, std::memory_order_relaxed);
  }
  *blocks = count;
  return cudaSuccess;
}

template <typename T>
ScanSizes sizes_of(const ScanInput<T>& in) {
  return {in.batch, in.unlabeled_batch, in.labeled.slots, in.unlabeled.slots};
}

template <typename T>
cudaError_t prepare(
    const ScanSizes& sizes, bool backward, void* memory, int64_t* blocks, ScanWorkspace<T>* workspace, int64_t* bytes) {
  const cudaError_t status = resident_blocks<T>(backward, blocks);
  if (status != cudaSuccess) return status;
  *blocks = scan_blocks(sizes, kScanThreads, *blocks);
  *bytes = workspace->lay_out(memory, sizes, *blocks, backward);
  return cudaSuccess;
}

template <typename T>
cudaError_t launch(
    const void* kernel, const ScanWorkspace<T>& workspace, int64_t blocks, void** arguments, void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaMemsetAsync(workspace.arrived, 0, kClearedBytes, queue);
  if (status != cudaSuccess) return status;
  return cudaLaunchCooperativeKernel(kernel, static_cast<unsigned>(blocks), kScanThreads, arguments, 0, queue);
}

template <typename T>
int scan_workspace_bytes(const ScanSizes& sizes, int64_t* bytes) {
  *bytes = 0;
  for (const bool backward : {false, true}) {
    int64_t blocks = 0, needed = 0;
    ScanWorkspace<T> workspace;
    const cudaError_t status = prepare<T>(sizes, backward, nullptr, &blocks, &workspace, &needed);
    if (status != cudaSuccess) return status;
    *bytes = std::max(*bytes, needed);
  }
  return cudaSuccess;
}

template <typename T>
int launch_scan_forward(const ScanInput<T>& in, const ScanOutput<T>& out, void* memory, void* stream) {
  int64_t blocks = 0, bytes = 0;
  ScanWorkspace<T> workspace;
  const cudaError_t status = prepare<T>(sizes_of(in), false, memory, &blocks, &workspace, &bytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {const_cast<ScanInput<T>*>(&in), const_cast<ScanOutput<T>*>(&out), &workspace};
  return launch(reinterpret_cast<const void*>(scan_forward_kernel<T>), workspace, blocks, arguments, stream);
}

template <typename T>
int launch_scan_backward(
    const ScanInput<T>& in,
    const ScanOutput<T>& out,
    const ScanGradient<T>& gradient,
    void* memory,
    void* stream) {
  int64_t blocks = 0, bytes = 0;
  ScanWorkspace<T> workspace;
  const cudaError_t status = prepare<T>(sizes_of(in), true, memory, &blocks, &workspace, &bytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {
      const_cast<ScanInput<T>*>(&in), const_cast<ScanOutput<T>*>(&out), const_cast<ScanGradient<T>*>(&gradient),
      &workspace};
  return launch(reinterpret_cast<const void*>(scan_backward_kernel<T>), workspace, blocks, arguments, stream);
}

}  // namespace dan_fast
