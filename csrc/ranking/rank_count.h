// How entries are counted. As internal to an instruction set as ../cpu/vector.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../cpu/tile.h"
#include "rank.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Values that are looked at together: often all of them come after all matches.
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

// The searches add `half` or nothing: a branch would be mispredicted every other time.
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

// As many matches are compared one by one with a vector of values; more are searched.
constexpr int64_t kFewMatches = 48;

template <typename A>
using Mask = decltype(Vector<A>{} < Vector<A>{});

// count_values for few matches: for each, the values before it are counted in lanes. Values between the bounds of a
// match, few of them, are then moved from the bucket that the bounds say to the right one.
template <typename A, typename Counter, typename Exact>
inline void count_against_few(const A* values, int64_t size, int64_t first_place, const Matches<A>& matches,
                              Counter* buckets, const Exact& exact) {
  constexpr int kVectors = 4;
  constexpr int64_t kStep = kVectors * kWidth<A>;
  static_assert(kStep <= kGroup);
  Mask<A> before[kFewMatches] = {};
  for (int64_t from = 0; from < size; from += kStep) {
    const int64_t count = std::min(kStep, size - from);
    A rest[kStep];
    const A* step = values + from;
    if (count < kStep) {
      // What is padded comes after all matches.
      std::fill(std::copy_n(step, count, rest), rest + kStep, std::numeric_limits<A>::infinity());
      step = rest;
    }
    Vector<A> x[kVectors];
    Mask<A> near[kVectors] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(step + v * kWidth<A>);
    for (int64_t m = 0; m < matches.count; ++m) {
      const Vector<A> lower = broadcast(matches.lower[m]), upper = broadcast(matches.upper[m]);
      Mask<A> sum = before[m];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum -= x[v] < lower;
        near[v] |= ~(x[v] < lower) & ~(x[v] > upper);
      }
      before[m] = sum;
    }
    const Mask<A> any = near[0] | near[1] | near[2] | near[3];
    int64_t lanes_near = 0;
    for (int64_t lane = 0; lane < kWidth<A>; ++lane) lanes_near |= any[lane];
    if (lanes_near == 0) continue;
    for (int64_t i = 0; i < count; ++i) {
      if (near[i / kWidth<A>][i % kWidth<A>] == 0) continue;
      // Between the bounds of a match, hence not below its lower one: at least 1.
      const int64_t reached = bounds_reached(matches.lower, matches.count, step[i]);
      --buckets[reached];
      ++buckets[exact_bucket(matches, exact(from + i), first_place + from + i)];
    }
  }
  Counter counted = 0;
  for (int64_t m = 0; m < matches.count; ++m) {
    Counter sum = 0;
    for (int64_t lane = 0; lane < kWidth<A>; ++lane) sum += static_cast<Counter>(before[m][lane]);
    buckets[m] += sum - counted;
    counted = sum;
  }
}

// Adds each value to the bucket of the first match that it comes before; the last bucket, of what comes after all
// matches, holds anything. `exact(i)` is the key of values[i].
template <typename A, typename Counter, typename Exact>
inline void count_values(const A* values, int64_t size, int64_t first_place, const Matches<A>& matches,
                         Counter* buckets, const Exact& exact) {
  if (matches.count <= kFewMatches) {
    count_against_few(values, size, first_place, matches, buckets, exact);
    return;
  }
  const A farthest = matches.upper[matches.count - 1];
  for (int64_t group = 0; group < size; group += kGroup) {
    const int64_t end = std::min(size, group + kGroup);
    int near = 0;
    for (int64_t i = group; i < end; ++i) near += values[i] > farthest ? 0 : 1;
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
    if (!pairs.junk[p]) found.get()[count++] = {key_of(pairs.gallery[p]), pairs.gallery[p]};
  }
  std::sort(found.get(), found.get() + count);
  for (int64_t m = 0; m < count; ++m) {
    matches.keys[m] = found.get()[m].key;
    matches.places[m] = found.get()[m].place;
  }
  for (int64_t p = pairs.offsets[query]; count > 0 && p < pairs.offsets[query + 1]; ++p) {
    if (pairs.junk[p]) --buckets[exact_bucket(matches, key_of(pairs.gallery[p]), pairs.gallery[p])];
  }
}

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
