// false_sets.h on CUDA: a block a row, a radix select in shared memory.
#pragma once

#include <cstdint>

#include "../cuda/top_n.cuh"
#include "false_sets.h"

namespace dan_fast {

// What a row has to know before it selects.
template <typename Key>
struct RowTotal {
  uint32_t same;        // slots with the label: how many to select
  Key lowest, highest;  // among the keys of occupied slots
  static __device__ RowTotal none() { return {0, static_cast<Key>(-1), 0}; }
  __device__ void add(const RowTotal& other) {
    same += other.same;
    lowest = other.lowest < lowest ? other.lowest : lowest;
    highest = other.highest > highest ? other.highest : highest;
  }
  __device__ RowTotal from_lane(int step) const {
    return {__shfl_xor_sync(kAllLanes, same, step), __shfl_xor_sync(kAllLanes, lowest, step),
            __shfl_xor_sync(kAllLanes, highest, step)};
  }
};

template <typename Key>
struct FalseSetsShared {
  RowTotal<Key> totals[kMaxWarps + 1];
  TopNShared top;
  uint32_t histograms[kHistograms * kBins];
};

// Row blockIdx.x.
template <typename S>
class FalseSetsRow {
 public:
  using Bits = typename FloatBits<S>::Bits;
  using Key = ValueKey<S>;

  __device__ FalseSetsRow(const FalseSets& sets, FalseSetsShared<Key>& shared)
      : sets_(sets),
        shared_(shared),
        at_(static_cast<int64_t>(blockIdx.x) * sets.slots),
        evaluation_(static_cast<const Bits*>(sets.evaluation) + at_),
        label_(sets.pseudo_labels[blockIdx.x]) {}

  __device__ void run() {
    RowTotal<Key> total = RowTotal<Key>::none();
    if (label_ >= 0) {
      for (int64_t i = threadIdx.x; i < sets_.slots; i += blockDim.x) {
        if (sets_.labels[i] < 0) continue;
        const Key key = value_key<S>(evaluation_[i]);
        total.add({sets_.labels[i] == label_ ? 1u : 0u, key, key});
      }
    }
    total = GridThreads(nullptr).block_total(total, shared_.totals);
    TopN<Key, kValueKeyBits<S>> top(shared_.top, shared_.histograms, sets_.slots);
    if (total.same > 0) select(total, top);
    for (int64_t i = threadIdx.x; i < sets_.slots; i += blockDim.x) {
      const int64_t label = sets_.labels[i];
      const bool chosen = total.same > 0 && label >= 0 && top.contains(key(i, total), i);
      sets_.false_positive[at_ + i] = total.same > 0 && label == label_ && !chosen;
      sets_.false_negative[at_ + i] = label != label_ && chosen;
    }
  }

 private:
  // Weights lie within a factor of e^2, their keys close together: measured from the lowest and moved up until the
  // highest fills its bits, they part in the first pass.
  __device__ Key key(int64_t i, const RowTotal<Key>& total) const {
    return (value_key<S>(evaluation_[i]) - total.lowest) << shift_;
  }

  __device__ void select(const RowTotal<Key>& total, TopN<Key, kValueKeyBits<S>>& top) {
    const Key span = total.highest - total.lowest;
    while (span != 0 && ((span << shift_) & (Key(1) << (kValueKeyBits<S> - 1))) == 0) ++shift_;
    top.start();
    count(total, top);
    for (bool done = top.narrow(total.same); !done; done = top.narrow()) count(total, top);
  }

  __device__ void count(const RowTotal<Key>& total, TopN<Key, kValueKeyBits<S>>& top) {
    // The block has its histograms to itself; `publish` has the barrier that this needs.
    for (int bin = threadIdx.x; bin < kHistograms * kBins; bin += blockDim.x) shared_.histograms[bin] = 0;
    for (int64_t i = threadIdx.x; i < sets_.slots; i += blockDim.x) {
      if (sets_.labels[i] >= 0) top.add(key(i, total), i);
    }
    top.publish();
    __syncthreads();
  }

  const FalseSets& sets_;
  FalseSetsShared<Key>& shared_;
  const int64_t at_;
  const Bits* const evaluation_;
  const int64_t label_;
  int shift_ = 0;
};

}  // namespace dan_fast
