// Runs a CUDA kernel's body as C++: one host thread for every thread of a block. Blocks run one after the other, or,
// as in a cooperative launch, all at once.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline

struct Index {
  unsigned x = 0;
};

inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// The lanes of a warp exchange values by way of a barrier, as the hardware does within one instruction. There are two
// places for them: a lane that still reads one has not arrived at the barrier after which the others write to it again.
struct Warp {
  Barrier barrier{32};
  uint64_t lanes[2][32];
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Block* block = nullptr;
inline thread_local Warp* warp = nullptr;
inline thread_local unsigned turn = 0;

template <typename T>
T from_lane(T value, unsigned other) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t* const lanes = warp->lanes[turn++ % 2];
  std::memcpy(&lanes[threadIdx.x % 32], &value, sizeof(T));
  warp->barrier.wait();
  T result;
  std::memcpy(&result, &lanes[other], sizeof(T));
  return result;
}

template <typename Kernel>
void run_blocks(unsigned first, unsigned last, unsigned blocks, unsigned threads, const Kernel& kernel) {
  std::vector<std::unique_ptr<Block>> running_blocks;
  std::vector<std::thread> running;
  for (unsigned b = first; b < last; ++b) {
    running_blocks.push_back(std::make_unique<Block>(threads));
    for (unsigned t = 0; t < threads; ++t) {
      running.emplace_back([&kernel, own = running_blocks.back().get(), b, blocks, t, threads] {
        threadIdx.x = t;
        blockIdx.x = b;
        blockDim.x = threads;
        gridDim.x = blocks;
        block = own;
        warp = own->warps[t / 32].get();
        kernel();
      });
    }
  }
  for (std::thread& thread : running) thread.join();
}

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  for (unsigned b = 0; b < blocks; ++b) run_blocks(b, b + 1, blocks, threads, kernel);
}

template <typename Kernel>
void launch_cooperative(unsigned blocks, unsigned threads, const Kernel& kernel) {
  run_blocks(0, blocks, blocks, threads, kernel);
}

// Whether the barrier of a grid orders nothing, which ThreadSanitizer must report.
inline bool barrier_is_broken = false;

}  // namespace on_host

namespace dan_fast {

inline void add_release(uint32_t* counter, uint32_t value) {
  if (on_host::barrier_is_broken) {
    __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
  } else {
    __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
  }
}

inline uint32_t load_acquire(const uint32_t* counter) {
  sched_yield();  // the other blocks need this core
  return on_host::barrier_is_broken ? __atomic_load_n(counter, __ATOMIC_RELAXED)
                                    : __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

}  // namespace dan_fast

inline void __syncthreads() { on_host::block->barrier.wait(); }
inline void __syncwarp() { on_host::warp->barrier.wait(); }

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return on_host::from_lane(value, threadIdx.x % 32 ^ static_cast<unsigned>(mask));
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  const unsigned lane = threadIdx.x % 32, other = lane + static_cast<unsigned>(step);
  return on_host::from_lane(value, other < 32 ? other : lane);
}
