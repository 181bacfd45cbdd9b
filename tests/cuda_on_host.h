// Runs a CUDA kernel's body as C++: one host thread for every thread of a block, blocks one after the other.
#pragma once

#include <pthread.h>

#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__

struct Index {
  unsigned x = 0;
};

inline thread_local Index threadIdx, blockIdx, blockDim;

namespace on_host {

// The lanes of a warp exchange values between two barriers, as the hardware does within one instruction.
class Warp {
 public:
  Warp() { pthread_barrier_init(&barrier_, nullptr, 32); }
  ~Warp() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }
  double lanes[32];

 private:
  pthread_barrier_t barrier_;
};

inline thread_local Warp* warp = nullptr;

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  for (unsigned block = 0; block < blocks; ++block) {
    std::vector<std::unique_ptr<Warp>> warps;
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        threadIdx.x = t;
        blockIdx.x = block;
        blockDim.x = threads;
        warp = warps[t / 32].get();
        kernel();
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace on_host

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= sizeof(double));
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(&on_host::warp->lanes[lane], &value, sizeof(T));
  on_host::warp->wait();
  T other;
  std::memcpy(&other, &on_host::warp->lanes[lane ^ static_cast<unsigned>(mask)], sizeof(T));
  on_host::warp->wait();
  return other;
}
