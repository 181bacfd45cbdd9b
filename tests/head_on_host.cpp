// The CUDA kernels of the attention head on host threads. As a library: a function for each kernel and type of map,
// over arrays that the caller owns. As a program (compiled with -DHEAD_ON_HOST_MAIN): a few samples through each
// kernel, for the sanitizers to watch.
#include "maps_on_host.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "../csrc/attention/head_cuda_attend_backward.cuh"
#include "../csrc/attention/head_cuda_features.cuh"
#include "../csrc/attention/head_cuda_pool.cuh"

using namespace dan_fast;

namespace {

// Whether the workspace is shorter than it should be, to see that AddressSanitizer notices.
bool workspace_is_short = false;

struct Call {
  const int64_t* sizes;     // B, C, P, h
  const int64_t* strides;   // of samples, channels, positions
  const int64_t* machine;   // threads a block, bytes of shared memory, blocks that run at once
  void* const* arrays;

  template <typename T>
  T* array(int at) const {
    return static_cast<T*>(arrays[at]);
  }

  template <typename S>
  FeatureMap<S> map() const {
    return {static_cast<S*>(arrays[0]), sizes[0], sizes[1], sizes[2], strides[0], strides[1], strides[2]};
  }

  HeadSizes head_sizes() const { return {sizes[0], sizes[1], sizes[2], sizes[3]}; }
  unsigned threads() const { return static_cast<unsigned>(machine[0]); }

  template <typename A>
  AttendInput<A> input() const {
    return {array<A>(1), array<A>(2), array<int64_t>(3),
            {sizes[3], array<A>(4), array<A>(5), array<A>(6), array<A>(7)}};
  }
};

template <typename S, bool kChannelsLast>
struct Kernels {
  using A = typename StatisticOf<S>::type;

  static HeadPlanning planning(const Call& call) {
    return {sizeof(S), sizeof(A), kChannelsLast, call.machine[0], call.machine[1]};
  }

  static void pool(const Call& call) {
    const HeadPlan plan = planning(call).pool(call.head_sizes());
    const Pooled<A> out = {call.array<A>(1), call.array<A>(2), call.array<int32_t>(3)};
    Rubbish shared(plan.shared_bytes);
    const auto map = call.map<const S>();
    on_host::launch(static_cast<unsigned>(plan.blocks()), call.threads(), [&] {
      head_pool_block<S, A, kChannelsLast>(map, out, plan, shared.get());
    });
  }

  // kernel(plan, workspace, shared memory of this block)
  template <typename Kernel>
  static void cooperate(const Call& call, bool backward, const Kernel& kernel) {
    const HeadSizes sizes = call.head_sizes();
    const HeadPlan plan = plan_attend<A>(planning(call), sizes, backward, call.machine[2]);
    HeadWorkspace<A> workspace;
    const int64_t bytes = workspace.lay_out(nullptr, sizes, plan, backward);
    Rubbish memory(workspace_is_short ? bytes - 256 : bytes), shared(plan.blocks() * plan.shared_bytes);
    workspace.lay_out(memory.get(), sizes, plan, backward);
    std::memset(workspace.arrived, 0, static_cast<size_t>(HeadWorkspace<A>::cleared_bytes(sizes)));
    on_host::launch_cooperative(static_cast<unsigned>(plan.blocks()), call.threads(), [&] {
      kernel(plan, workspace, shared.get() + blockIdx.x * plan.shared_bytes);
    });
  }

  static void attend(const Call& call) {
    const auto map = call.map<const S>();
    const auto in = call.input<A>();
    const Attended<A> out = {call.array<A>(8),  call.array<A>(9),        call.array<A>(10), call.array<A>(11),
                             call.array<A>(12), call.array<int32_t>(13), call.array<A>(14)};
    cooperate(call, false, [&](const HeadPlan& plan, const HeadWorkspace<A>& workspace, unsigned char* shared) {
      head_attend_block<S, A, kChannelsLast>(map, in, out, plan, workspace, shared);
    });
  }

  static void attend_backward(const Call& call) {
    const auto map = call.map<const S>();
    const auto in = call.input<A>();
    const Saved<A> saved = {call.array<A>(8),  call.array<A>(9),        call.array<A>(10),
                            call.array<A>(11), call.array<int32_t>(12), call.array<A>(13)};
    const AttendedGrad<A> grad = {call.array<A>(14), call.array<A>(15), call.array<A>(16)};
    const AttendInputGrad<A> out = {call.array<A>(17), call.array<A>(18), call.array<A>(19),
                                    call.array<A>(20), call.array<A>(21), call.array<A>(22),
                                    call.array<A>(23), call.array<A>(24), call.array<A>(25)};
    cooperate(call, true, [&](const HeadPlan& plan, const HeadWorkspace<A>& workspace, unsigned char* shared) {
      head_attend_backward_block<S, A, kChannelsLast>(map, in, saved, grad, out, plan, workspace, shared);
    });
  }

  static void features_backward(const Call& call) {
    const auto map = call.map<S>();
    const FeaturesGradInput<A> in = {
        call.array<A>(1), call.array<A>(2), call.array<A>(3), call.array<int32_t>(4), call.array<int32_t>(5),
        call.array<A>(6), call.array<A>(7), call.array<A>(8), call.array<A>(9), call.array<A>(10), call.array<A>(11)};
    const auto shared = std::make_unique<FeaturesGradShared<A>>();
    const int64_t blocks = map.batch * ((map.channels + kGradChannels - 1) / kGradChannels) *
                           ((map.positions + kGradPositions - 1) / kGradPositions);
    on_host::launch(static_cast<unsigned>(blocks), kHeadThreads, [&] {
      head_features_backward_block<S, A, kChannelsLast>(map, in, *shared);
    });
  }
};

}  // namespace

#define HEAD_KERNEL_ON_HOST(kernel, name, S)                                                           \
  extern "C" void kernel##_##name(                                                                     \
      const int64_t* sizes, const int64_t* strides, const int64_t* machine, void* const* arrays) {     \
    const Call call = {sizes, strides, machine, arrays};                                               \
    strides[2] == 1 ? Kernels<S, false>::kernel(call) : Kernels<S, true>::kernel(call);                \
  }
#define HEAD_ON_HOST(name, S)                    \
  HEAD_KERNEL_ON_HOST(pool, name, S)             \
  HEAD_KERNEL_ON_HOST(attend, name, S)           \
  HEAD_KERNEL_ON_HOST(attend_backward, name, S)  \
  HEAD_KERNEL_ON_HOST(features_backward, name, S)
HEAD_ON_HOST(float32, float)
#ifndef HEAD_ON_HOST_MAIN
HEAD_ON_HOST(float64, double)
HEAD_ON_HOST(bfloat16, Brain)
#endif

#ifdef HEAD_ON_HOST_MAIN
// usage: head_on_host [racy|short]
int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  on_host::barrier_is_broken = what == "racy";
  workspace_is_short = what == "short";
  constexpr int64_t kBatch = 3, kChannels = 22, kPositions = 6, kHidden = 2;
  std::mt19937 random(7);
  std::uniform_real_distribution<float> number(-1.0f, 1.0f);
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<int32_t>> integers;
  const auto numbers = [&](int64_t size) {
    floats.emplace_back(static_cast<size_t>(size));
    for (float& x : floats.back()) x = number(random);
    return floats.back().data();
  };
  const auto indices = [&](int64_t size) {
    integers.emplace_back(static_cast<size_t>(size));
    return integers.back().data();
  };
  std::vector<int64_t> labels = {0, -1, 3};
  constexpr int64_t kByChannel = kBatch * kChannels, kByPosition = kBatch * kPositions, kWeights = kHidden * kPositions;
  const int64_t sizes[] = {kBatch, kChannels, kPositions, kHidden};
  for (const bool channels_last : {false, true}) {
    const int64_t sample = kChannels * kPositions;
    const int64_t strides[] = {sample, channels_last ? 1 : kPositions, channels_last ? kChannels : 1};
    // Three blocks a sample, each all in shared memory; then several tiles a block, positions apart too.
    for (const int64_t shared_limit : {channels_last ? 1500 : 1200, 200}) {
      const int64_t machine[] = {32, shared_limit, 4};
      float* const map = numbers(kBatch * sample);
      int32_t *const peak_position = indices(kByChannel), *const peak_channel = indices(kByPosition);
      void* pooled[] = {map, numbers(kByChannel), numbers(kByChannel), peak_position};
      pool_float32(sizes, strides, machine, pooled);
      std::vector<void*> attended = {map, numbers(kByChannel), numbers(kByChannel), labels.data()};
      for (int i = 0; i < 4; ++i) attended.push_back(numbers(kWeights));
      std::vector<void*> backward = attended;
      float* const out[] = {numbers(kByChannel),  numbers(kByPosition), numbers(kBatch),
                            numbers(kByPosition), numbers(kByPosition), numbers(kByPosition)};
      attended.insert(attended.end(), {out[0], out[1], out[2], out[3], out[4], peak_channel, out[5]});
      attend_float32(sizes, strides, machine, attended.data());
      backward.insert(backward.end(), {out[0], out[1], out[3], out[4], peak_channel, out[5]});
      float* const upstream = numbers(kByChannel);
      backward.insert(backward.end(), {upstream, numbers(kByPosition), numbers(kBatch)});
      float* const grads[] = {numbers(kByChannel), numbers(kByChannel), numbers(kByPosition), numbers(kByPosition),
                              numbers(kByPosition)};
      backward.insert(backward.end(), std::begin(grads), std::end(grads));
      for (int i = 0; i < 4; ++i) backward.push_back(numbers(kWeights));
      attend_backward_float32(sizes, strides, machine, backward.data());
      void* features[] = {map,      backward[1], backward[2], out[1],   peak_channel,        peak_position,
                          upstream, grads[2],    grads[3],    grads[4], numbers(kByChannel), numbers(kByChannel)};
      features_backward_float32(sizes, strides, machine, features);
    }
  }
  std::puts("ok");
}
#endif
