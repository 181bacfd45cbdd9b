// Cooperative launches: how many blocks of a kernel run at once, which a launch must not exceed, and the launch itself.
//
// Every call of the CUDA runtime that may fail, but for launches followed by cudaGetLastError, stands here. The
// extension links a runtime of its own, which keeps the last error until cudaGetLastError reads it; PyTorch clears its
// own runtime's only, and the next launch would report an old error.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace dan_fast {

// `status`, and the runtime forgets it.
inline cudaError_t forgotten(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// What a kernel's devices have answered, so that a launch costs no query. Static, one for each kernel.
class ResidentBlocks {
 public:
  // On the current device, with so many threads and bytes of dynamic shared memory: always the same numbers.
  cudaError_t ask(const void* kernel, int threads, size_t shared_bytes, int64_t* blocks) {
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return forgotten(status);
    int count = device < kDevices ? known_[device].load(std::memory_order_relaxed) : 0;
    if (count == 0) {
      int processors = 0, per_processor = 0;
      status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
      if (status != cudaSuccess) return forgotten(status);
      status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes);
      if (status != cudaSuccess) return forgotten(status);
      count = processors * per_processor;
      if (count == 0) return cudaErrorCooperativeLaunchTooLarge;
      if (device < kDevices) known_[device].store(count, std::memory_order_relaxed);
    }
    *blocks = count;
    return cudaSuccess;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> known_[kDevices] = {};
};

// Sets `cleared_bytes` at `cleared` to zero, where the barrier of the grid counts, and launches `blocks` blocks.
inline cudaError_t launch_cooperative(
    const void* kernel, int64_t blocks, int threads, size_t shared_bytes, void** arguments, void* cleared,
    size_t cleared_bytes, cudaStream_t stream) {
  const cudaError_t status = cudaMemsetAsync(cleared, 0, cleared_bytes, stream);
  if (status != cudaSuccess) return forgotten(status);
  return forgotten(cudaLaunchCooperativeKernel(
      kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), arguments, shared_bytes, stream));
}

}  // namespace dan_fast
