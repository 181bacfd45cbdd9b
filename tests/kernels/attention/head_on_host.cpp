// The CUDA kernels of the attention head on host threads. As a library: a function for each direction and type of map,
// over arrays that the caller owns, in the order of the operators' schemas. As a program (compiled with
// -DHEAD_ON_HOST_MAIN): a few samples through all kernels, under the sanitizers.
#include "maps_on_host.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "../../../csrc/attention/cuda/head_attend_backward.cuh"
#include "../../../csrc/attention/cuda/head_bottleneck_backward.cuh"
#include "../../../csrc/attention/cuda/head_features.cuh"
#include "../../../csrc/attention/cuda/head_forward.cuh"

using namespace dan_fast;

namespace {

// Whether the workspace is shorter than it should be, which AddressSanitizer must report.
bool workspace_is_short = false;

struct Call {
  const int64_t* sizes;    // B, C, P, units, h, classes
  const int64_t* strides;  // of samples, channels, positions; then those of the map's gradient
  const int64_t* machine;  // threads a block, bytes of shared memory for the map, blocks that run at once, blocks of
                           // the kernels that divide what there is among any number
  void* const* arrays;

  template <typename T>
  T* array(int at) const {
    return static_cast<T*>(arrays[at]);
  }

  template <typename S>
  FeatureMap<S> map(int at, const int64_t* steps) const {
    return {static_cast<S*>(arrays[at]), sizes[0], sizes[1], sizes[2], steps[0], steps[1], steps[2]};
  }

  // The map of S; of void where only its sizes are read.
  template <typename S, typename A>
  HeadInput<S, A> in() const {
    return {map<const S>(0, strides), sizes[3],         array<A>(1), array<A>(2), sizes[5], array<A>(7),
            array<int64_t>(8),        {sizes[4], array<A>(3), array<A>(4), array<A>(5), array<A>(6)}};
  }

  template <typename A>
  HeadOutput<A> out() const {
    return {{array<A>(10), array<A>(16), array<int32_t>(17)},
            array<A>(14),
            array<A>(15),
            array<A>(11),
            {array<A>(9), array<A>(12), array<A>(13), array<A>(18), array<A>(19), array<int32_t>(20), array<A>(21)}};
  }

  template <typename A>
  HeadOutput<const A> saved() const {
    return {{array<A>(10), array<A>(15), array<int32_t>(16)},
            array<A>(13),
            array<A>(14),
            array<A>(11),
            {array<A>(9), array<A>(12), nullptr, array<A>(17), array<A>(18), array<int32_t>(19), array<A>(20)}};
  }

  template <typename A>
  HeadGrad<A> grad() const {
    return {{array<A>(21), array<A>(24), array<A>(25)}, array<A>(22), array<A>(23)};
  }

  template <typename S, typename A>
  HeadInputGrad<S, A> grad_in() const {
    return {map<S>(26, strides + 3), array<A>(27), array<A>(28), array<A>(29),
            array<A>(30),            array<A>(31), array<A>(32), array<A>(33)};
  }

  HeadSizes head_sizes() const { return {sizes[0], sizes[1], sizes[2], sizes[4], sizes[3]}; }
  unsigned threads() const { return static_cast<unsigned>(machine[0]); }
};

template <typename S, bool kChannelsLast>
class Head {
 public:
  using A = Statistic<S>;

  Head(const Call& call, bool backward) : call_(call) {
    // A small limit shall make small tiles: the numbers that the products exchange are added to it.
    const int64_t shared = call.machine[1] + (backward ? 0 : kHeadProductNumbers * static_cast<int64_t>(sizeof(A)));
    const HeadPlanning planning = {sizeof(S), sizeof(A), kChannelsLast, call.machine[0], shared};
    plan_ = plan_head<A>(planning, call.head_sizes(), backward, call.machine[2]);
    const int64_t bytes = workspace_.lay_out(nullptr, call.head_sizes(), plan_, backward);
    memory_ = std::make_unique<Rubbish>(workspace_is_short ? bytes - 256 : bytes);
    workspace_.lay_out(memory_->get(), call.head_sizes(), plan_, backward);
    std::memset(workspace_.arrived, 0, static_cast<size_t>(HeadWorkspace<A>::cleared_bytes(call.head_sizes())));
  }

  void forward() const {
    const auto in = call_.in<S, A>();
    const auto out = call_.out<A>();
    cooperate([&](unsigned char* shared) {
      head_forward_block<S, A, kChannelsLast>(in, out, plan_, workspace_, shared);
    });
  }

  void backward() const {
    const auto in = call_.in<S, A>();
    const auto in_any_map = call_.in<void, A>();
    const auto saved = call_.saved<A>();
    const auto grad = call_.grad<A>();
    const auto grad_in = call_.grad_in<void, A>();
    cooperate([&](unsigned char* shared) {
      head_attend_backward_block<S, A, kChannelsLast>(in, saved, grad, plan_, workspace_, shared);
    });
    Rubbish numbers(HeadWeightsBackward<A>::kShared * static_cast<int64_t>(sizeof(A)));
    const unsigned blocks = static_cast<unsigned>(call_.machine[3]);
    on_host::launch(blocks, call_.threads(), [&] {
      head_weights_backward_block<A>(in_any_map, saved, workspace_, grad_in, reinterpret_cast<A*>(numbers.get()));
    });
    on_host::launch(blocks, call_.threads(), [&] {
      head_pooled_backward_block<A>(in_any_map, saved, grad.pooled, workspace_, grad_in);
    });
    const auto features = features_grad_input(saved, grad, workspace_);
    call_.strides[5] == 1 ? write_features<false>(features) : write_features<true>(features);
  }

 private:
  // The map's gradient may lie in memory otherwise than the map.
  template <bool kGradChannelsLast>
  void write_features(const FeaturesGradInput<A>& in) const {
    const auto map = call_.grad_in<S, A>().features;
    const auto shared = std::make_unique<FeaturesGradShared<S, A>>();
    const int64_t tiles = map.batch * ((map.channels + kGradChannels - 1) / kGradChannels) *
                          ((map.positions + kGradPositions - 1) / kGradPositions);
    on_host::launch(static_cast<unsigned>(tiles), kHeadThreads, [&] {
      head_features_backward_block<S, A, kGradChannelsLast>(map, in, *shared);
    });
  }

  // kernel(shared memory of this block)
  template <typename Kernel>
  void cooperate(const Kernel& kernel) const {
    Rubbish shared(plan_.blocks() * plan_.shared_bytes);
    on_host::launch_cooperative(static_cast<unsigned>(plan_.blocks()), call_.threads(), [&] {
      kernel(shared.get() + blockIdx.x * plan_.shared_bytes);
    });
  }

  const Call& call_;
  HeadPlan plan_;
  HeadWorkspace<A> workspace_;
  std::unique_ptr<Rubbish> memory_;
};

template <typename S>
void run(const Call& call, bool backward) {
  const auto go = [&](const auto& head) { backward ? head.backward() : head.forward(); };
  call.strides[2] == 1 ? go(Head<S, false>(call, backward)) : go(Head<S, true>(call, backward));
}

}  // namespace

#define HEAD_ON_HOST(name, S)                                                                          \
  extern "C" void forward_##name(                                                                      \
      const int64_t* sizes, const int64_t* strides, const int64_t* machine, void* const* arrays) {     \
    run<S>({sizes, strides, machine, arrays}, false);                                                  \
  }                                                                                                    \
  extern "C" void backward_##name(                                                                     \
      const int64_t* sizes, const int64_t* strides, const int64_t* machine, void* const* arrays) {     \
    run<S>({sizes, strides, machine, arrays}, true);                                                   \
  }
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
  constexpr int64_t kBatch = 3, kChannels = 22, kPositions = 6, kUnits = 9, kHidden = 2, kClasses = 2;
  constexpr int64_t kSample = kChannels * kPositions, kByChannel = kBatch * kChannels, kByUnit = kBatch * kUnits;
  constexpr int64_t kByPosition = kBatch * kPositions;
  constexpr int64_t kBottleneck = kUnits * kChannels, kSpatial = kHidden * kPositions;
  const int64_t sizes[] = {kBatch, kChannels, kPositions, kUnits, kHidden, kClasses};
  std::mt19937 random(7);
  std::uniform_real_distribution<float> number(-1.0f, 1.0f);
  std::vector<std::unique_ptr<float[]>> floats;
  const auto numbers = [&](int64_t size) -> void* {
    floats.push_back(std::make_unique<float[]>(static_cast<size_t>(size)));
    for (int64_t i = 0; i < size; ++i) floats.back()[static_cast<size_t>(i)] = number(random);
    return floats.back().get();
  };
  std::vector<int32_t> peak_position(kByChannel), peak_channel(kByPosition);
  std::vector<int64_t> labels = {0, -1, 3};  // the last is no class
  for (const bool channels_last : {false, true}) {
    const int64_t by_channel = channels_last ? 1 : kPositions, by_position = channels_last ? kChannels : 1;
    const int64_t strides[] = {kSample, by_channel, by_position, kSample, by_channel, by_position};
    // Two blocks a sample, each all in shared memory but for the backward's vectors; several tiles a block, positions
    // apart too; a block a sample with all it has in shared memory.
    for (const int64_t shared_limit : {600, 200, 1500}) {
      const int64_t machine[] = {32, shared_limit, 4, 2};
      std::vector<void*> forward = {numbers(kBatch * kSample)};
      for (const int64_t size : {kBottleneck, kBottleneck, kSpatial, kSpatial, kSpatial, kSpatial}) {
        forward.push_back(numbers(size));
      }
      forward.insert(forward.end(), {numbers(kClasses * kChannels), labels.data()});
      std::vector<void*> backward = forward;
      for (const int64_t size :
           {kByChannel, kByChannel, kByChannel, kByPosition, kBatch, kByUnit, kByUnit, kByChannel}) {
        forward.push_back(numbers(size));
      }
      forward.insert(forward.end(), {peak_position.data(), numbers(kByPosition), numbers(kByPosition),
                                     peak_channel.data(), numbers(kByPosition)});
      forward_float32(sizes, strides, machine, forward.data());
      for (size_t i = 9; i < forward.size(); ++i) {
        if (i != 13) backward.push_back(forward[i]);  // all but the loss
      }
      for (const int64_t size : {kByChannel, kByChannel, kByChannel, kByPosition, kBatch}) {
        backward.push_back(numbers(size));
      }
      for (const int64_t size : {kBatch * kSample, kBottleneck, kBottleneck, kSpatial, kSpatial, kSpatial, kSpatial,
                                 kClasses * kChannels}) {
        backward.push_back(numbers(size));
      }
      backward_float32(sizes, strides, machine, backward.data());
    }
  }
  std::puts("ok");
}
#endif
