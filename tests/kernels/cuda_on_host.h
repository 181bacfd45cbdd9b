// Runs a CUDA kernel's body as C++. Each thread of a block has a stack of its own, and one thread of the host runs them
// all: where one waits, the next goes on, without the system's scheduler. Blocks run one after the other, or, as in a
// cooperative launch, all at once.
#pragma once

#include <dlfcn.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline

// Of ThreadSanitizer, where it is linked: to it each stack is a thread.
extern "C" __attribute__((weak)) void* __tsan_get_current_fiber();
extern "C" __attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
extern "C" __attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);

struct Index {
  unsigned x = 0;
};

namespace on_host {

struct Block;
struct Warp;

struct Thread {
  Index index, block_index;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned turn = 0, number = 0, has_work = 0;
  Thread* next = nullptr;  // to go on where this one waits
  void* to_sanitizer = nullptr;
  ucontext_t context;
  alignas(16) char stack[256 << 10];
};

inline Thread host;  // the one that launches
inline Thread* running = &host;
inline Index block_size, grid_size;

// The C library's own: AddressSanitizer's forgets where the variables on a stack end.
inline const auto swap_stacks = reinterpret_cast<int (*)(ucontext_t*, const ucontext_t*)>(
    dlsym(dlopen("libc.so.6", RTLD_LAZY), "swapcontext"));

inline Thread& self() { return *__atomic_load_n(&running, __ATOMIC_RELAXED); }

// Lets the others go on. It orders nothing: a race is one even if the other thread has long gone on.
__attribute__((noinline, no_sanitize("thread"))) inline void yield() {
  Thread& own = *running;
  running = own.next;
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(running->to_sanitizer, 1);
  swap_stacks(&own.context, &running->context);
}

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  void wait() {
    const unsigned round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads_) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round) yield();
  }

 private:
  unsigned threads_, arrived_ = 0, round_ = 0;
};

// The lanes of a warp exchange values by way of a barrier, as the hardware does within one instruction. There are two
// places for them: a lane that still reads one has not arrived at the barrier after which the others write to it again.
struct Warp {
  Barrier barrier{32};
  uint64_t lanes[2][32];
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / 32) {}
  Barrier barrier;
  std::vector<Warp> warps;
};

template <typename T>
T from_lane(T value, unsigned other) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& own = self();
  uint64_t* const lanes = own.warp->lanes[own.turn++ % 2];
  std::memcpy(&lanes[own.index.x % 32], &value, sizeof(T));
  own.warp->barrier.wait();
  T result;
  std::memcpy(&result, &lanes[other], sizeof(T));
  return result;
}

// They stay, for a new one takes ThreadSanitizer long.
inline std::vector<Thread*>& threads = *new std::vector<Thread*>;
inline void (*work)(unsigned number) = nullptr;
inline const void* work_of = nullptr;
inline unsigned working = 0;
inline bool backwards = false;

inline void stay() {
  for (Thread& own = self();;) {
    while (__atomic_load_n(&own.has_work, __ATOMIC_ACQUIRE) == 0) yield();
    own.has_work = 0;
    work(own.number);
    __atomic_sub_fetch(&working, 1, __ATOMIC_RELEASE);
  }
}

inline void add_thread() {
  Thread* const thread = new Thread;
  thread->number = static_cast<unsigned>(threads.size());
  threads.push_back(thread);
  if (__tsan_create_fiber != nullptr) {
    thread->to_sanitizer = __tsan_create_fiber(0);
    host.to_sanitizer = __tsan_get_current_fiber();
  }
  getcontext(&thread->context);
  thread->context.uc_stack.ss_sp = thread->stack;
  thread->context.uc_stack.ss_size = sizeof thread->stack;
  makecontext(&thread->context, stay, 0);
}

// `at_once` of the blocks run at a time. In every other launch the last thread goes first, so that a result that
// depends on their order is not the same again.
template <typename Kernel>
void run_blocks(unsigned at_once, unsigned blocks, unsigned size, const Kernel& kernel) {
  std::vector<std::unique_ptr<Block>> at_work;
  for (unsigned b = 0; b < at_once; ++b) at_work.push_back(std::make_unique<Block>(size));
  const auto each = [&](unsigned number) {
    Thread& own = self();
    own.index.x = number % size;
    own.block = at_work[number / size].get();
    own.warp = &own.block->warps[own.index.x / 32];
    for (own.block_index.x = number / size; own.block_index.x < blocks; own.block_index.x += at_once) {
      kernel();
      own.block->barrier.wait();  // the next block has the same shared memory
    }
  };
  work_of = &each;
  work = [](unsigned number) { (*static_cast<decltype(&each)>(work_of))(number); };
  block_size.x = size;
  grid_size.x = blocks;
  working = at_once * size;
  while (threads.size() < working) add_thread();
  backwards = !backwards;
  Thread* last = &host;
  for (unsigned i = 0; i < at_once * size; ++i) {
    last = last->next = threads[backwards ? at_once * size - 1 - i : i];
    __atomic_store_n(&last->has_work, 1, __ATOMIC_RELEASE);
  }
  last->next = &host;
  while (__atomic_load_n(&working, __ATOMIC_ACQUIRE) > 0) yield();
}

template <typename Kernel>
void launch(unsigned blocks, unsigned size, const Kernel& kernel) {
  run_blocks(blocks > 0, blocks, size, kernel);
}

template <typename Kernel>
void launch_cooperative(unsigned blocks, unsigned size, const Kernel& kernel) {
  run_blocks(blocks, blocks, size, kernel);
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
  on_host::yield();  // the other blocks need this core
  return on_host::barrier_is_broken ? __atomic_load_n(counter, __ATOMIC_RELAXED)
                                    : __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

}  // namespace dan_fast

#define threadIdx (on_host::self().index)
#define blockIdx (on_host::self().block_index)
#define blockDim on_host::block_size
#define gridDim on_host::grid_size

inline void __syncthreads() { on_host::self().block->barrier.wait(); }
inline void __syncwarp() { on_host::self().warp->barrier.wait(); }

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
