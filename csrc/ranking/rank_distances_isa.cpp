#include "rank_count.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

constexpr int64_t kChunk = 1024;

}  // namespace

template <typename S, typename A>
bool rank_by_distances(const DistanceRows<S>& rows, const Pairs& pairs, int64_t query) {
  const S* row = rows.distances + query * rows.row_stride;
  const int64_t count = pairs.match_offsets[query + 1] - pairs.match_offsets[query];
  const Scratch<double> keys(count);
  const Scratch<int64_t> places(count), buckets(count + 1);
  const Scratch<A> bounds(count), wide(std::is_same_v<S, A> ? 0 : kChunk);
  // A given distance is exact: nothing lies between the bounds but equal distances.
  const Matches<A> matches{count, keys.get(), places.get(), bounds.get(), bounds.get()};
  bool numbers = true;
  take_pairs(pairs, query, matches, buckets.get(), [&](int64_t entry) {
    const A distance = load_one<A>(row + entry);
    numbers &= distance == distance;
    return static_cast<double>(distance);
  });
  if (!numbers) return false;
  for (int64_t m = 0; m < count; ++m) bounds.get()[m] = static_cast<A>(keys.get()[m]);
  for (int64_t first = 0; first < rows.gallery; first += kChunk) {
    const int64_t size = std::min(kChunk, rows.gallery - first);
    const A* values;
    if constexpr (std::is_same_v<S, A>) {
      values = row + first;
    } else {
      widen(row + first, size, wide.get());
      values = wide.get();
    }
    if (count == 0) {
      int nans = 0;
      for (int64_t i = 0; i < size; ++i) nans += values[i] == values[i] ? 0 : 1;
      numbers &= nans == 0;
      continue;
    }
    count_values(values, size, first, matches, buckets.get(), [&](int64_t i) {
      numbers &= values[i] == values[i];
      return static_cast<double>(values[i]);
    });
  }
  int64_t* ranks = pairs.ranks + pairs.match_offsets[query];
  for (int64_t m = 0, before = 0; m < count; ++m) ranks[m] = 1 + (before += buckets.get()[m]);
  return numbers;
}

#define DAN_FAST_INSTANTIATE(S, A) template bool rank_by_distances<S, A>(const DistanceRows<S>&, const Pairs&, int64_t);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast::DAN_FAST_ISA
