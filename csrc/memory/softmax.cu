#include <cuda_runtime.h>

#include <climits>

#include "softmax.cuh"

namespace dan_fast {
namespace {

constexpr int kRowThreads = 1024, kSlotThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    slot_softmax_kernel(const SlotScores<T> in, const uint8_t* occupied, T* weights) {
  __shared__ SoftmaxShared<T> shared;
  slot_softmax_row(in, occupied, weights, shared);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    backward_row_kernel(const SlotScores<T> in, const SoftmaxGradient<T> gradient, T* means) {
  __shared__ SoftmaxShared<T> shared;
  slot_softmax_backward_row(in, gradient, means, shared);
}

template <typename T>
__global__ void __launch_bounds__(kSlotThreads)
    backward_slots_kernel(const SlotScores<T> in, const SoftmaxGradient<T> gradient, const T* means) {
  __shared__ ColumnShared<T> shared;
  slot_softmax_backward_slots(in, gradient, means, shared);
}

}  // namespace

template <typename T>
int launch_slot_softmax(const SlotScores<T>& in, const uint8_t* occupied, T* weights, void* stream) {
  if (in.rows > INT_MAX) return cudaErrorInvalidValue;
  if (in.rows == 0 || in.slots == 0) return cudaSuccess;
  slot_softmax_kernel<T><<<static_cast<unsigned>(in.rows), kRowThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      in, occupied, weights);
  return cudaGetLastError();
}

template <typename T>
int launch_slot_softmax_backward(
    const SlotScores<T>& in, const SoftmaxGradient<T>& gradient, T* means, void* stream) {
  const int64_t blocks = (in.slots + kLanes - 1) / kLanes;
  if (in.rows > INT_MAX || blocks > INT_MAX) return cudaErrorInvalidValue;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (in.rows > 0) {
    backward_row_kernel<T><<<static_cast<unsigned>(in.rows), kRowThreads, 0, queue>>>(in, gradient, means);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  if (blocks == 0) return cudaSuccess;
  backward_slots_kernel<T><<<static_cast<unsigned>(blocks), kSlotThreads, 0, queue>>>(in, gradient, means);
  return cudaGetLastError();
}

#define DAN_FAST_INSTANTIATE(T)                                                                       \
  template int launch_slot_softmax(const SlotScores<T>&, const uint8_t*, T*, void*);                  \
  template int launch_slot_softmax_backward(const SlotScores<T>&, const SoftmaxGradient<T>&, T*, void*);
DAN_FAST_INSTANTIATE(float)
DAN_FAST_INSTANTIATE(double)

}  // namespace dan_fast
