// The n largest of the keys that the threads of a cooperative grid hold, lowest index first among equal keys: a radix
// select from the highest digit down, over the digits of the key and, only if equal keys must be told apart, over
// those of the index. Every pass costs one barrier of the grid; it ends as soon as a whole bucket is taken.
#pragma once

#include <cstdint>

#include "grid.cuh"

namespace dan_fast {

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
// While one histogram is read the next is filled, and the one after that is emptied.
constexpr int kHistograms = 3;

struct TopNShared {
  uint32_t counts[kBins];
  uint32_t digit, needed, in_bucket;
};

// Keys are 0 .. 2^kKeyBits - 1. All threads of the grid call `start`, `publish` and `narrow` together:
//   start(); add() own elements; publish(); <barrier of the grid>;
//   for (bool done = narrow(n); !done; done = narrow()) { add() own elements; publish(); <barrier of the grid>; }
// whereupon `contains` tells which are among the n largest. `narrow` may be left out if n is 0.
template <typename Key, int kKeyBits>
class TopN {
 public:
  // `histograms`: kHistograms * kBins numbers in global memory, 0 when the kernel starts.
  __device__ TopN(TopNShared& shared, uint32_t* histograms, int64_t size) : shared_(shared), histograms_(histograms) {
    while (index_digits_ < 8 && (size - 1) >> (kDigitBits * index_digits_) != 0) ++index_digits_;
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) shared_.counts[bin] = 0;
    __syncthreads();
  }

  __device__ void start() {
    passes_ = 0;
    key_prefix_ = 0;
    index_prefix_ = 0;
  }

  __device__ void add(Key key, int64_t index) {
    if (compare(key, index) != 0) return;
    const int64_t digits = passes_ < kKeyDigits ? static_cast<int64_t>(aligned(key) >> key_shift(passes_ + 1))
                                                : reversed(index) >> index_shift(passes_ + 1);
    atomicAdd(&shared_.counts[digits & (kBins - 1)], 1u);
  }

  __device__ void publish() {
    turn_ = (turn_ + 1) % kHistograms;
    const int next = (turn_ + 1) % kHistograms;
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
      if (blockIdx.x == 0) histograms_[next * kBins + bin] = 0;
      if (shared_.counts[bin] != 0) atomicAdd(&histograms_[turn_ * kBins + bin], shared_.counts[bin]);
      shared_.counts[bin] = 0;
    }
  }

  // Of the elements of the bucket, `needed` are to be taken. True when `contains` may be asked.
  __device__ bool narrow(uint32_t needed) {
    constexpr int kOwn = kBins / kLanes;
    if (threadIdx.x < kLanes) {
      const int lane = threadIdx.x;
      uint32_t own[kOwn], sum = 0;
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        own[k] = histograms_[turn_ * kBins + lane * kOwn + k];
        sum += own[k];
      }
      uint32_t from_here = sum;
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
        const uint32_t other = __shfl_down_sync(kAllLanes, from_here, step);
        if (lane + step < kLanes) from_here += other;
      }
      uint32_t above = from_here - sum;
      if (above < needed && needed <= from_here) {
        bool found = false;
#pragma unroll
        for (int k = kOwn - 1; k >= 0; --k) {
          if (found) continue;
          if (above + own[k] < needed) {
            above += own[k];
            continue;
          }
          found = true;
          shared_.digit = lane * kOwn + k;
          shared_.needed = needed - above;
          shared_.in_bucket = own[k];
        }
      }
    }
    __syncthreads();
    if (passes_ < kKeyDigits) {
      key_prefix_ = (key_prefix_ << kDigitBits) | static_cast<Key>(shared_.digit);
    } else {
      index_prefix_ = (index_prefix_ << kDigitBits) | shared_.digit;
    }
    ++passes_;
    needed_ = shared_.needed;
    // After the last digit a bucket holds one element. Keys out of range would be counted otherwise: an answer then is
    // better than a grid that never ends.
    return needed_ == shared_.in_bucket || passes_ == kKeyDigits + index_digits_;
  }

  __device__ bool narrow() { return narrow(needed_); }

  __device__ bool contains(Key key, int64_t index) const { return compare(key, index) >= 0; }

 private:
  static constexpr int kKeyDigits = (kKeyBits + kDigitBits - 1) / kDigitBits;

  // The highest digit is a full one, so that the first pass parts as much as a pass can.
  static __device__ Key aligned(Key key) { return key << (kKeyDigits * kDigitBits - kKeyBits); }
  __device__ int64_t reversed(int64_t index) const {
    return (int64_t{1} << (kDigitBits * index_digits_)) - 1 - index;
  }
  static __device__ int key_shift(int passes) { return kDigitBits * (kKeyDigits - passes); }
  __device__ int index_shift(int passes) const { return kDigitBits * (kKeyDigits + index_digits_ - passes); }

  // Above (1), in (0) or below (-1) the bucket that the passes so far have narrowed the search to.
  __device__ int compare(Key key, int64_t index) const {
    // Shifting by the width of the type would be undefined.
    const Key digits = passes_ == 0 ? Key(0) : aligned(key) >> key_shift(passes_ < kKeyDigits ? passes_ : kKeyDigits);
    if (digits != key_prefix_) return digits > key_prefix_ ? 1 : -1;
    if (passes_ <= kKeyDigits) return 0;
    const int64_t rest = reversed(index) >> index_shift(passes_);
    return rest == index_prefix_ ? 0 : rest > index_prefix_ ? 1 : -1;
  }

  TopNShared& shared_;
  uint32_t* histograms_;
  int index_digits_ = 1;
  int turn_ = 0;
  int passes_ = 0;
  uint32_t needed_ = 0;
  Key key_prefix_ = 0;
  int64_t index_prefix_ = 0;
};

}  // namespace dan_fast
