// The n largest of many keys without sorting: a radix search for the key of rank n. For `*_isa.cpp` files.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// The chosen are the places i with keys[i] > key, or keys[i] == key and i <= last: the lowest places first on ties.
template <typename Key>
struct Cut {
  Key key;
  int64_t last;

  bool chooses(Key candidate, int64_t place) const {
    return candidate > key || (candidate == key && place <= last);
  }
};

// The cut that chooses `wanted` of the keys that are not negative; there are at least `wanted` >= 1 of them, all below
// 2^key_bits. `places` has room for `size` numbers.
template <typename Key>
Cut<Key> cut_of_largest(const Key* keys, int64_t size, int64_t wanted, int key_bits, int64_t* places) {
  constexpr int kDigit = 12;
  constexpr int64_t kBins = int64_t{1} << kDigit;
  uint32_t counts[kBins];
  int64_t left = 0;
  for (int shift = key_bits - kDigit, level = 0;; shift -= kDigit, ++level) {
    const int low = shift < 0 ? 0 : shift;
    const auto digit = [=](Key key) { return static_cast<int64_t>(key >> low) & (kBins - 1); };
    for (int64_t bin = 0; bin < kBins; ++bin) counts[bin] = 0;
    if (level == 0) {
      for (int64_t i = 0; i < size; ++i) {
        if (keys[i] >= 0) ++counts[digit(keys[i])];
      }
    } else {
      for (int64_t k = 0; k < left; ++k) ++counts[digit(keys[places[k]])];
    }
    int64_t bin = kBins - 1;
    for (; counts[bin] < wanted; --bin) wanted -= counts[bin];

    // The bin that holds the key of rank n; of the others some are chosen whole, some not at all.
    int64_t kept = 0;
    if (level == 0) {
      for (int64_t i = 0; i < size; ++i) {
        places[kept] = i;
        kept += keys[i] >= 0 && digit(keys[i]) == bin;
      }
    } else {
      for (int64_t k = 0; k < left; ++k) {
        const int64_t place = places[k];
        places[kept] = place;
        kept += digit(keys[place]) == bin;
      }
    }
    left = kept;
    if (left == wanted) {
      const Key lowest = (keys[places[0]] >> low) << low;
      return {static_cast<Key>(lowest - 1), -1};
    }
    if (low == 0) return {keys[places[0]], places[wanted - 1]};
  }
}

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
