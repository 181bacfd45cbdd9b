// The CUDA kernels of refine.h on host threads. As a library: a function for each operator and type of map, over arrays
// that the caller owns. As a program (compiled with -DREFINE_ON_HOST_MAIN): a few samples through each operator, under
// the sanitizers.
#include "maps_on_host.h"

#include <cstdio>
#include <random>
#include <string>

#include "../../../csrc/attention/cuda/adversary.cuh"

using namespace dan_fast;

namespace {

// Whether the memory for partial sums is shorter than it should be, and whether all blocks have the same shared memory
// at a time, which the sanitizers must report.
bool partial_is_short = false, blocks_collide = false;

struct Call {
  const int64_t* sizes;    // B, C, P
  const int64_t* strides;  // of samples, channels, positions; of one map after the other
  void* const* arrays;     // the maps, then the rest

  template <typename T>
  T* array(int at) const {
    return static_cast<T*>(arrays[at]);
  }

  template <typename S>
  FeatureMap<S> map(int at) const {
    const int64_t* const own = strides + 3 * at;
    return {array<S>(at), sizes[0], sizes[1], sizes[2], own[0], own[1], own[2]};
  }

  bool channels_last(int at) const { return strides[3 * at + 2] != 1; }
  unsigned blocks() const { return static_cast<unsigned>(sizes[0] * map_parts(sizes[1])); }
};

template <typename S, bool kChannelsLast>
struct Kernels {
  using A = Statistic<S>;

  // kernel(shared memory)
  template <typename Kernel>
  static void launch(const Call& call, const Kernel& kernel) {
    Rubbish shared(sizeof(MapShared<A>));
    const auto body = [&] { kernel(*reinterpret_cast<MapShared<A>*>(shared.get())); };
    if (blocks_collide) {
      on_host::launch_cooperative(call.blocks(), kMapThreads, body);
    } else {
      on_host::launch(call.blocks(), kMapThreads, body);
    }
  }

  static void refine(const Call& call) {
    const auto features = call.map<const S>(0);
    const auto refined = call.map<S>(1);
    const Attentions<A> in = {call.array<A>(2), call.array<A>(3)};
    launch(call, [&](MapShared<A>& shared) { refine_block<S, A, kChannelsLast>(features, in, refined, shared); });
  }

  static void refine_backward(const Call& call) {
    const auto features = call.map<const S>(0), grad_refined = call.map<const S>(1);
    const auto grad_features = call.map<S>(2);
    const Attentions<A> in = {call.array<A>(3), call.array<A>(4)};
    A *const grad_channel = call.array<A>(5), *const grad_spatial = call.array<A>(6);
    const int64_t parts = map_parts(features.channels), size = features.batch * features.positions;
    Rubbish memory((size * parts - (partial_is_short ? 1 : 0)) * static_cast<int64_t>(sizeof(A)));
    A* const partial = reinterpret_cast<A*>(memory.get());
    launch(call, [&](MapShared<A>& shared) {
      refine_backward_block<S, A, kChannelsLast>(
          features, in, grad_refined, grad_features, grad_channel, partial, shared);
    });
    const unsigned blocks = static_cast<unsigned>((size + kMapThreads - 1) / kMapThreads);
    on_host::launch(blocks, kMapThreads, [&] {
      add_parts(static_cast<const A*>(partial), parts, features.positions, size, grad_spatial);
    });
  }

  static void channel_sums(const Call& call, int at, const A* weights, A* partial) {
    const auto map = call.map<const S>(at);
    launch(call, [&](MapShared<A>& shared) { channel_sums_block<S, A, kChannelsLast>(map, weights, partial, shared); });
  }

  static void adversary_backward(const Call& call) {
    const auto features = call.map<const S>(0);
    const auto grad_features = call.map<S>(1);
    const AdversaryInput<A> in = {call.array<A>(2), call.array<int64_t>(3)};
    const AdversarySaved<A> saved = {call.array<A>(4), call.array<A>(5), call.array<A>(6), call.array<A>(7),
                                     call.array<A>(8)};
    const AdversaryInputGrad<A> out = {call.array<A>(9), call.array<A>(10)};
    launch(call, [&](MapShared<A>& shared) {
      adversary_backward_block<S, A, kChannelsLast>(features, in, saved, grad_features, out, shared);
    });
  }
};

template <typename S>
void adversary(const Call& call) {
  using A = Statistic<S>;
  const int64_t channels = call.sizes[1], positions = call.sizes[2], size = call.blocks() * positions;
  Rubbish memory(2 * size * static_cast<int64_t>(sizeof(A)));
  A *const refined = reinterpret_cast<A*>(memory.get()), *const features = refined + size;
  const AdversaryInput<A> in = {call.array<A>(2), call.array<int64_t>(3)};
  const Adversary<A> out = {call.array<A>(4), call.array<A>(5), call.array<A>(6)};
  const auto sums = [&](int at, const A* weights, A* partial) {
    call.channels_last(at) ? Kernels<S, true>::channel_sums(call, at, weights, partial)
                           : Kernels<S, false>::channel_sums(call, at, weights, partial);
  };
  sums(1, nullptr, refined);
  sums(0, in.rows, features);
  A handed[kMapThreads / kLanes];
  on_host::launch(static_cast<unsigned>(call.sizes[0]), kMapThreads, [&] {
    adversary_block<A>(refined, features, channels, positions, in, out, handed);
  });
}

}  // namespace

// The map at `written` says in which layout all are.
#define REFINE_KERNEL_ON_HOST(kernel, name, S, written)                                                            \
  extern "C" void kernel##_##name(const int64_t* sizes, const int64_t* strides, void* const* arrays) {             \
    const Call call = {sizes, strides, arrays};                                                                    \
    call.channels_last(written) ? Kernels<S, true>::kernel(call) : Kernels<S, false>::kernel(call);                \
  }
#define REFINE_ON_HOST(name, S)                                                                          \
  REFINE_KERNEL_ON_HOST(refine, name, S, 1)                                                              \
  REFINE_KERNEL_ON_HOST(refine_backward, name, S, 2)                                                     \
  REFINE_KERNEL_ON_HOST(adversary_backward, name, S, 1)                                                  \
  extern "C" void adversary_##name(const int64_t* sizes, const int64_t* strides, void* const* arrays) {  \
    adversary<S>({sizes, strides, arrays});                                                              \
  }
REFINE_ON_HOST(float32, float)
#ifndef REFINE_ON_HOST_MAIN
REFINE_ON_HOST(float64, double)
REFINE_ON_HOST(bfloat16, Brain)
#endif

#ifdef REFINE_ON_HOST_MAIN
// usage: refine_on_host [racy|short]
int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  blocks_collide = what == "racy";
  partial_is_short = what == "short";
  // Two blocks a sample; one tile of positions, and two of them.
  for (const int64_t positions : {6, 68}) {
    constexpr int64_t kBatch = 1, kChannels = 68;
    std::mt19937 random(7);
    std::uniform_real_distribution<float> number(-1.0f, 1.0f);
    std::vector<std::vector<float>> floats;
    const auto numbers = [&](int64_t size) {
      floats.emplace_back(static_cast<size_t>(size));
      for (float& x : floats.back()) x = number(random);
      return floats.back().data();
    };
    std::vector<int64_t> labels = {3};
    const int64_t sample = kChannels * positions, by_channel = kBatch * kChannels, by_position = kBatch * positions;
    const int64_t sizes[] = {kBatch, kChannels, positions};
    for (const bool channels_last : {false, true}) {
      if (channels_last && positions == 6) continue;
      std::vector<int64_t> strides;
      for (int map = 0; map < 3; ++map) {
        strides.insert(
            strides.end(), {sample, channels_last ? 1 : positions, channels_last ? kChannels : int64_t{1}});
      }
      float *const x = numbers(kBatch * sample), *const y = numbers(kBatch * sample);
      float* const to = numbers(kBatch * sample);
      float *const channel = numbers(by_channel), *const spatial = numbers(by_position);
      void* refined[] = {x, y, channel, spatial};
      refine_float32(sizes, strides.data(), refined);
      void* refined_back[] = {x, y, to, channel, spatial, numbers(by_channel), numbers(by_position)};
      refine_backward_float32(sizes, strides.data(), refined_back);
      float* const maps[] = {numbers(by_position), numbers(by_position)};
      void* adversary[] = {x, y, channel, labels.data(), numbers(kBatch), maps[0], maps[1]};
      adversary_float32(sizes, strides.data(), adversary);
      void* back[] = {x, to, channel, labels.data(), maps[0], maps[1], numbers(kBatch), numbers(by_position),
                      numbers(by_position), numbers(by_channel), numbers(by_position)};
      adversary_backward_float32(sizes, strides.data(), back);
    }
  }
  std::puts("ok");
}
#endif
