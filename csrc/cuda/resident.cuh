// How many blocks of a kernel run at once, which a cooperative launch must not exceed.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace dan_fast {

// What a kernel's devices have answered, so that a launch costs no query. Static, one for each kernel.
class ResidentBlocks {
 public:
  // On the current device, with so many threads and bytes of dynamic shared memory: always the same numbers.
  cudaError_t ask(const void* kernel, int threads, size_t shared_bytes, int64_t* blocks) {
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    int count = device < kDevices ? known_[device].load(std::memory_order_relaxed) : 0;
    if (count == 0) {
      int processors = 0, per_processor = 0;
      status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
      if (status != cudaSuccess) return status;
      status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes);
      if (status != cudaSuccess) return status;
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

}  // namespace dan_fast
