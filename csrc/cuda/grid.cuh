// Sums over a warp, a block and a whole grid, and the barrier of a grid whose blocks all run at once (launched by
// cudaLaunchCooperativeKernel). Of CUDA's headers only threadIdx, blockIdx, blockDim, gridDim, __syncthreads,
// __syncwarp, __shfl_xor_sync and __shfl_down_sync are used, so that the kernels also run on host threads.
#pragma once

#include <cstdint>

namespace dan_fast {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 1024 / kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__
// What this thread, and by way of __syncthreads its block, wrote before is visible to a thread that reads the sum with
// load_acquire.
__device__ __forceinline__ void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
#endif

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Lane l gets values[l % kCount], added up over the lanes that differ from it in the bits below kCount only.
template <int kCount, typename T>
__device__ __forceinline__ T deal_out(const T (&values)[kCount]) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (threadIdx.x & kHalf) != 0;
    T sums[kHalf];
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const T given = upper ? values[k] : values[k + kHalf];
      sums[k] = (upper ? values[k + kHalf] : values[k]) + __shfl_xor_sync(kAllLanes, given, kHalf);
    }
    return deal_out(sums);
  }
}

// Lane l gets the sum over the warp of values[l % kCount]: as many shuffles as values, not five times as many.
template <int kCount, typename T>
__device__ __forceinline__ T warp_sum_of_each(const T (&values)[kCount]) {
  T sum = deal_out(values);
#pragma unroll
  for (int step = kCount; step < kLanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// One thread's view of a cooperative grid of blocks of blockDim.x threads, a multiple of 32.
//
// A `Total` has `none()`, `add(other)` and `from_lane(step)`, the value of the lane whose number differs in `step`.
// Totals are added in an order that depends on the sizes of the grid only: the same bits in every run, and in every
// block, so that all may go on with their own copy.
class GridThreads {
 public:
  // `arrived`: one counter in global memory, 0 when the kernel starts.
  __device__ explicit GridThreads(uint32_t* arrived)
      : arrived_(arrived), lane_(threadIdx.x % kLanes), warp_(threadIdx.x / kLanes), warps_(blockDim.x / kLanes) {}

  // This thread's first slot, and how far it is to the next.
  __device__ int64_t first() const { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
  __device__ int64_t stride() const { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
  __device__ int lane() const { return lane_; }
  __device__ int warp() const { return warp_; }
  __device__ int warps() const { return warps_; }

  // All that any thread wrote before is seen by every thread after.
  __device__ void sync() {
    __syncthreads();
    if (threadIdx.x == 0) pass();
    __syncthreads();
  }

  // The total over the block. `shared` has kMaxWarps + 1 elements of shared memory. It may be used again at once:
  // a thread that still reads the result has not reached the next call's first __syncthreads.
  template <typename Total>
  __device__ Total block_total(Total value, Total* shared) {
    value = over_warps(value, shared);
    if (threadIdx.x == 0) shared[kMaxWarps] = value;
    __syncthreads();
    return shared[kMaxWarps];
  }

  // The total over the grid; a barrier of the grid as `sync` is. `partials` has gridDim.x elements of global memory.
  // They may not be those of the call just before, which other blocks may still be reading; those of the call before
  // that are free, because to get here every block had to arrive at the barrier in between.
  template <typename Total>
  __device__ Total grid_total(Total value, Total* shared, Total* partials) {
    value = over_warps(value, shared);
    if (warp_ == 0) {
      if (lane_ == 0) {
        partials[blockIdx.x] = value;
        pass();
      }
      __syncwarp();
      value = Total::none();
      for (unsigned block = lane_; block < gridDim.x; block += kLanes) value.add(partials[block]);
      value = over_lanes(value);
      if (lane_ == 0) shared[kMaxWarps] = value;
    }
    __syncthreads();
    return shared[kMaxWarps];
  }

 private:
  template <typename Total>
  __device__ Total over_lanes(Total value) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) value.add(value.from_lane(step));
    return value;
  }

  // Holds in warp 0.
  template <typename Total>
  __device__ Total over_warps(Total value, Total* shared) const {
    value = over_lanes(value);
    if (lane_ == 0) shared[warp_] = value;
    __syncthreads();
    if (warp_ == 0) value = over_lanes(lane_ < warps_ ? shared[lane_] : Total::none());
    return value;
  }

  // The counter only grows, so no barrier has to be reset; the difference is right even after it has wrapped around.
  __device__ void pass() {
    passed_ += gridDim.x;
    add_release(arrived_, 1);
    while (static_cast<int32_t>(load_acquire(arrived_) - passed_) < 0) {
    }
  }

  uint32_t* arrived_;
  uint32_t passed_ = 0;
  int lane_, warp_, warps_;
};

}  // namespace dan_fast
