// How entries are counted. For rank_*_isa.cpp only: everything has internal linkage, so that no instruction set gets
// another's code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../memory/stream_tile.h"
#include "rank.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Values that are told to be too far for all matches at one go.
constexpr int64_t kGroup = 64;

// The matches of one query by (key, place), and the bounds between which a value decides nothing.
template <typename A>
struct Matches {
  int64_t count;
  double* keys;
  int64_t* places;
  A* lower;
  A* upper;
};

// The searches add `half` or nothing: a branch would be foreseen wrongly every other time.
inline int64_t if_reached(bool reached, int64_t half) { return half & -static_cast<int64_t>(reached); }

// How many matches do not come after (key, place), its bucket; there is at least one. A match is not before itself.
template <typename A>
inline int64_t exact_bucket(const Matches<A>& matches, double key, int64_t place) {
  const auto reached = [&](int64_t at) {
    return (matches.keys[at] < key) | ((matches.keys[at] == key) & (matches.places[at] <= place));
  };
  int64_t first = 0, count = matches.count;
  while (count > 1) {
    const int64_t half = count / 2;
    first += if_reached(reached(first + half - 1), half);
    count -= half;
  }
  return first + if_reached(reached(first), 1);
}

// How many of the ascending bounds are not above the value; for NaN all of them. `count` > 0.
template <typename A>
inline int64_t bounds_reached(const A* bounds, int64_t count, A value) {
  const A* base = bounds;
  while (count > 1) {
    const int64_t half = count / 2;
    base += if_reached(!(value < base[half - 1]), half);
    count -= half;
  }
  return base - bounds + if_reached(!(value < *base), 1);
}

// Adds each value to the bucket of the first match that it comes before. `exact(i)` is the key of values[i].
template <typename A, typename Counter, typename Exact>
inline void count_values(const A* values, int64_t size, int64_t first_place, const Matches<A>& matches, Counter* buckets,
                         const Exact& exact) {
  const A farthest = matches.upper[matches.count - 1];
  for (int64_t group = 0; group < size; group += kGroup) {
    const int64_t end = std::min(size, group + kGroup);
    int near = 0;
    for (int64_t i = group; i < end; ++i) near += values[i] > farthest ? 0 : 1;
    // The last bucket, of what comes after all matches, is nobody's rank.
    if (near == 0) continue;
    for (int64_t i = group; i < end; ++i) {
      int64_t bucket = bounds_reached(matches.lower, matches.count, values[i]);
      if (bucket > 0 && !(values[i] > matches.upper[bucket - 1])) {
        bucket = exact_bucket(matches, exact(i), first_place + i);
      }
      ++buckets[bucket];
    }
  }
}

// Sorts a query's matches by key and place and takes its junk out of the buckets before anything is counted.
// key_of(entry) is the key of the query and a gallery entry.
template <typename A, typename KeyOf>
inline void take_pairs(const Pairs& pairs, int64_t query, const Matches<A>& matches, int64_t* buckets,
                       const KeyOf& key_of) {
  struct Found {
    double key;
    int64_t place;
    bool operator<(const Found& other) const { return key < other.key || (key == other.key && place < other.place); }
  };
  std::fill_n(buckets, matches.count + 1, 0);
  const Scratch<Found> found(matches.count);
  int64_t count = 0;
  for (int64_t p = pairs.offsets[query]; p < pairs.offsets[query + 1]; ++p) {
    if (!pairs.junk[p]) found.numbers[count++] = {key_of(pairs.gallery[p]), pairs.gallery[p]};
  }
  std::sort(found.numbers, found.numbers + count);
  for (int64_t m = 0; m < count; ++m) {
    matches.keys[m] = found.numbers[m].key;
    matches.places[m] = found.numbers[m].place;
  }
  for (int64_t p = pairs.offsets[query]; count > 0 && p < pairs.offsets[query + 1]; ++p) {
    if (pairs.junk[p]) --buckets[exact_bucket(matches, key_of(pairs.gallery[p]), pairs.gallery[p])];
  }
}

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
