#include <limits>

#include "rank_count.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

constexpr int64_t kStrips = 8;
constexpr int64_t kQueries = 128;  // whose sums with a gallery block stay in the second-level cache

// Half of the power of two to which the products of a key are padded.
inline int64_t half_of_padded(int64_t width) {
  int64_t half = 1;
  while (2 * half < width) half *= 2;
  return half;
}

template <typename S>
struct Row {
  const S* numbers;
  int64_t width;

  // N of them from c on, or as many as there are, in double.
  template <int N>
  void take(int64_t c, double* to) const {
    const int64_t count = std::min<int64_t>(N, width - c);
    if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) {
      for (int64_t i = 0; i < count; ++i) to[i] = numbers[c + i];
    } else {
      for (int64_t i = 0; i < count; i += kWidth<float>) {
        const int64_t some = std::min(kWidth<float>, count - i);
        const Vector<float> values =
            some == kWidth<float> ? load_as<float>(numbers + c + i) : load_some_as<float>(numbers + c + i, some);
        for (int64_t lane = 0; lane < some; ++lane) to[i + lane] = values[lane];
      }
    }
  }
};

constexpr int kTake = 64;  // numbers that are widened at a time

// <a, b> as rank.h says; `sums` holds half_of_padded(width) numbers.
template <typename S>
double dot(const S* a, const S* b, int64_t width, double* sums) {
  int64_t half = half_of_padded(width);
  const Row<S> left{a, width}, right{b, width};
  for (int64_t c = 0; c < std::min(half, width); c += kTake) {
    double x[2][kTake] = {}, y[2][kTake] = {};
    left.template take<kTake>(c, x[0]);
    right.template take<kTake>(c, y[0]);
    if (c + half < width) {
      left.template take<kTake>(c + half, x[1]);
      right.template take<kTake>(c + half, y[1]);
    }
    const int64_t count = std::min<int64_t>(kTake, half - c);
    double sum[kTake];
    for (int64_t i = 0; i < kTake; ++i) sum[i] = x[0][i] * y[0][i] + x[1][i] * y[1][i];
    std::copy_n(sum, count, sums + c);
  }
  for (half /= 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template <typename S>
double key_of(const FeatureRows<S>& rows, int64_t query, int64_t entry, double* sums) {
  const double product =
      dot(rows.query + query * rows.query_stride, rows.gallery + entry * rows.gallery_stride, rows.width, sums);
  const double q = rows.query_norms[query], g = rows.gallery_norms[entry], step = rows.steps[query];
  const double key = rows.cosine ? 1 - product / (q * g) : q + g - 2 * product;
  return std::nearbyint(key / step) * step;
}

// to[i * stride] = factor * from[i]
template <typename A, typename S>
void scale_row(const S* from, int64_t width, double factor, A* to, int64_t stride) {
  for (int64_t c = 0; c < width; c += kTake) {
    double x[kTake];
    Row<S>{from, width}.template take<kTake>(c, x);
    const int64_t count = std::min<int64_t>(kTake, width - c);
    for (int64_t i = 0; i < count; ++i) to[(c + i) * stride] = static_cast<A>(factor * x[i]);
  }
}

// A pair is compared by base - <q', g'>, q' and g' being scaled and <q', g'> a sum in A of chains of kChain products.
// Let u be A's unit roundoff and n = kChain + d / kChain the longest way of a product into the sum; then the sum is off
// by at most (n + 2) u |q'| |g'| (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1, and Cauchy-Schwarz),
// and the key's own roundings, to double and to the grid, by less than the terms that follow.
template <typename A, typename S>
double uncertainty(const FeatureRows<S>& rows, int64_t query) {
  const double unit = std::numeric_limits<A>::epsilon() / 2;
  const double ways = static_cast<double>(kChain + (rows.width + kChain - 1) / kChain + 8);
  const double squared_scale = rows.scale * rows.scale;
  const double q = rows.cosine ? 1 : std::sqrt(rows.query_norms[query]) * rows.scale;
  const double g = rows.cosine ? 1 : std::sqrt(rows.largest_gallery_norm) * rows.scale;
  const double grid = rows.cosine ? rows.steps[query] : rows.steps[query] * squared_scale / 2;
  // The last: numbers below the smallest normal one may be lost.
  return 1.02 * ways * unit * q * g + 8 * unit * (g * g + q * g) + 0x1p-46 * (q * q + g * g) + grid +
         0x1p-120 * static_cast<double>(rows.width);
}

template <typename A>
constexpr int64_t kBlockSums = kQueries * kStrips * kStrip<A>;

// One thread's gallery block.
template <typename S, typename A>
class GalleryBlock {
 public:
  static constexpr int64_t kEntries = kStrips * kStrip<A>;

  GalleryBlock(const FeatureRows<S>& rows, const Pairs& pairs, const QueryState<A>& state, int64_t first,
               int32_t* counts)
      : rows_(rows), pairs_(pairs), state_(state), counts_(counts), first_(first),
        entries_(std::min(kEntries, rows.gallery_size - first)), panels_(rows.width * kEntries), bases_(kEntries),
        sums_(kBlockSums<A>), halves_(half_of_padded(rows.width)) {}

  void run() {
    pack();
    for (int64_t query = 0; query < pairs_.queries; query += kQueries) {
      const int64_t queries = std::min(kQueries, pairs_.queries - query);
      multiply_block(query, queries);
      for (int64_t q = 0; q < queries; ++q) count(query + q, sums_.get() + q * kEntries);
    }
  }

 private:
  void pack() {
    std::fill_n(panels_.get(), rows_.width * kEntries, A(0));
    for (int64_t e = 0; e < entries_; ++e) {
      const double norm = rows_.gallery_norms[first_ + e];
      const double factor = rows_.cosine ? 1 / norm : rows_.scale;
      bases_.get()[e] = static_cast<A>(rows_.cosine ? 0 : norm * rows_.scale * rows_.scale / 2);
      A* panel = panels_.get() + e / kStrip<A> * kStrip<A> * rows_.width + e % kStrip<A>;
      scale_row(rows_.gallery + (first_ + e) * rows_.gallery_stride, rows_.width, factor, panel, kStrip<A>);
    }
  }

  void multiply_block(int64_t query, int64_t queries) {
    const int64_t strips = (entries_ + kStrip<A> - 1) / kStrip<A>;
    for (int64_t k = 0; k < rows_.width; k += kChain) {
      const int64_t depth = std::min(kChain, rows_.width - k);
      for (int64_t strip = 0; strip < strips; ++strip) {
        const A* panel = panels_.get() + (strip * rows_.width + k) * kStrip<A>;
        for (int64_t q = 0; q < queries; q += kTileRows) {
          const A* tile[kTileRows];
          point_at<kTileRows>(state_.rows, state_.stride, query + q, query + queries, k, tile);
          multiply<kTileRows, kTileVectors>(
              tile, depth, panel, k > 0, sums_.get() + q * kEntries + strip * kStrip<A>, kEntries);
        }
      }
    }
  }

  void count(int64_t query, A* sums) {
    const int64_t at = pairs_.match_offsets[query], matches = pairs_.match_offsets[query + 1] - at;
    if (matches == 0) return;
    for (int64_t e = 0; e < entries_; ++e) sums[e] = bases_.get()[e] - sums[e];
    const Matches<A> found{matches, state_.keys + at, state_.places + at, state_.lower + at, state_.upper + at};
    count_values(sums, entries_, first_, found, counts_ + at + query,
                 [&](int64_t e) { return key_of(rows_, query, first_ + e, halves_.get()); });
  }

  const FeatureRows<S>& rows_;
  const Pairs& pairs_;
  const QueryState<A>& state_;
  int32_t* const counts_;
  const int64_t first_, entries_;
  Scratch<A> panels_;  // strips of (d, kStrip)
  Scratch<A> bases_;
  Scratch<A> sums_;  // (kQueries, kEntries)
  Scratch<double> halves_;
};

}  // namespace

template <typename S>
void rank_square_norms(const S* rows, int64_t stride, int64_t width, int64_t first, int64_t last, double* out) {
  const Scratch<double> sums(half_of_padded(width));
  for (int64_t row = first; row < last; ++row) {
    out[row] = dot(rows + row * stride, rows + row * stride, width, sums.get());
  }
}

template <typename S, typename A>
void prepare_query(const FeatureRows<S>& rows, const Pairs& pairs, int64_t query, const QueryState<A>& state) {
  const int64_t at = pairs.match_offsets[query], count = pairs.match_offsets[query + 1] - at;
  const Matches<A> matches{count, state.keys + at, state.places + at, state.lower + at, state.upper + at};
  const Scratch<double> sums(half_of_padded(rows.width));
  take_pairs(pairs, query, matches, state.before + at + query,
             [&](int64_t entry) { return key_of(rows, query, entry, sums.get()); });
  const double norm = rows.query_norms[query];
  scale_row(rows.query + query * rows.query_stride, rows.width, rows.cosine ? 1 / norm : rows.scale,
            state.rows + query * state.stride, 1);
  if (count == 0) return;
  const double doubt = uncertainty<A>(rows, query);
  for (int64_t m = 0; m < count; ++m) {
    const double key = matches.keys[m];
    const double value = rows.cosine ? key - 1 : (key - norm) * rows.scale * rows.scale / 2;
    matches.lower[m] = static_cast<A>(value - doubt);
    matches.upper[m] = static_cast<A>(value + doubt);
  }
}

template <typename A>
int64_t gallery_block() {
  return kStrips * kStrip<A>;
}

template <typename S, typename A>
void count_gallery_block(const FeatureRows<S>& rows, const Pairs& pairs, const QueryState<A>& state, int64_t first,
                         int32_t* counts) {
  GalleryBlock<S, A>(rows, pairs, state, first, counts).run();
}

template int64_t gallery_block<float>();
template int64_t gallery_block<double>();

#define DAN_FAST_INSTANTIATE(S, A)                                                                            \
  template void rank_square_norms<S>(const S*, int64_t, int64_t, int64_t, int64_t, double*);                  \
  template void prepare_query<S, A>(const FeatureRows<S>&, const Pairs&, int64_t, const QueryState<A>&);      \
  template void count_gallery_block<S, A>(const FeatureRows<S>&, const Pairs&, const QueryState<A>&, int64_t, \
                                          int32_t*);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast::DAN_FAST_ISA
