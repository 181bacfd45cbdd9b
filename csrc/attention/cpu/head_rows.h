// Sums and maxima along the rows of a map whose positions are adjacent: kLanes partial results a row, whatever the
// instruction set, and those of a vector's worth of rows folded together. As internal to an instruction set as
// head_tile.h.
#pragma once

#include <utility>

#include "head_tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Positions of a row that make up one chain per lane.
template <typename A>
constexpr int64_t kRowPositions = 8 * kLanes<A>;

// Up to so many numbers at the end of a row are not worth a vector of each row.
constexpr int64_t kFewColumns = 4;

// Rows whose partial results are in registers.
template <typename A>
constexpr int kRowsAtOnce = static_cast<int>(std::min<int64_t>(4, kWidth<A>));
template <typename A>
constexpr int kRowGroups = static_cast<int>(kWidth<A>) / kRowsAtOnce<A>;

struct Add {
  template <typename V>
  V operator()(V a, V b) const {
    return a + b;
  }
};

struct Max {
  template <typename V>
  V operator()(V a, V b) const {
    return b > a ? b : a;
  }
};

struct Min {
  template <typename V>
  V operator()(V a, V b) const {
    return b < a ? b : a;
  }
};

struct AllLanes {
  template <typename V>
  V operator()(V values, V) const {
    return values;
  }
};

template <typename A>
struct FirstLanes {
  Indices<A> mask;
  Vector<A> operator()(Vector<A> values, Vector<A> others) const { return mask ? values : others; }
};

// Where lane `i` of the lower (or upper) halves of all runs of 2 kHalf lanes in a and b comes from; b's lanes are
// counted on from a's. Runs shorter than 16 bytes stay within theirs, as instructions have it.
template <typename T, int kHalf>
constexpr int source_of(int i, bool upper) {
  constexpr int kBlock = kHalf * sizeof(T) >= 16 ? static_cast<int>(kWidth<T>) : static_cast<int>(16 / sizeof(T));
  const int block = i / kBlock * kBlock, at = i % kBlock, in_one = at % (kBlock / 2);
  const int vector = at / (kBlock / 2) * static_cast<int>(kWidth<T>);
  return vector + block + in_one / kHalf * 2 * kHalf + in_one % kHalf + (upper ? kHalf : 0);
}

template <int kHalf, bool kUpper, typename T, int... I>
inline Vector<T> halves(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source_of<T, kHalf>(I, kUpper)...);
#else
  return __builtin_shuffle(a, b, Indices<T>{source_of<T, kHalf>(I, kUpper)...});
#endif
}

// The row that has to be fold's input `i` for row r to end up in lane r.
template <typename T>
constexpr int row_of(int i) {
  constexpr int kBlock = 16 / sizeof(T), kBlocks = static_cast<int>(kWidth<T>) / kBlock;
  return i % kBlocks * kBlock + i / kBlocks;
}

// Joins the lanes l and l + kHalf of N vectors that have 2 kHalf lanes of every row, then l and l + kHalf / 2 and so on
// until they are one vector. Overwrites them.
template <typename T, int kHalf, int N, typename Join>
inline Vector<T> fold(Vector<T>* vectors, const Join& join) {
  if constexpr (N == 1) {
    return vectors[0];
  } else {
    constexpr auto kIndices = std::make_integer_sequence<int, static_cast<int>(kWidth<T>)>();
#pragma GCC unroll 4
    for (int i = 0; i < N / 2; ++i) {
      const Vector<T> a = vectors[2 * i], b = vectors[2 * i + 1];
      vectors[i] = join(halves<kHalf, false, T>(a, b, kIndices), halves<kHalf, true, T>(a, b, kIndices));
    }
    return fold<T, kHalf / 2, N / 2>(vectors, join);
  }
}

// The lanes of kRowsAtOnce of fold's inputs, in parts.
template <typename T, typename Join>
inline Vector<T> fold_rows(Vector<T> (&parts)[kParts<T>][kRowsAtOnce<T>], const Join& join) {
#pragma GCC unroll 4
  for (int half = kParts<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      for (int r = 0; r < kRowsAtOnce<T>; ++r) parts[i][r] = join(parts[i][r], parts[i + half][r]);
    }
  }
  return fold<T, static_cast<int>(kWidth<T> / 2), kRowsAtOnce<T>>(parts[0], join);
}

// What fold_rows gave of all groups of rows.
template <typename T, typename Join>
inline Vector<T> fold_groups(Vector<T> (&groups)[kRowGroups<T>], const Join& join) {
  return fold<T, static_cast<int>(kWidth<T> / 2) / kRowsAtOnce<T>, kRowGroups<T>>(groups, join);
}

// A vector's worth of channels, some of their positions; the last channel stands in for those that the sample lacks.
template <typename A, typename S>
struct Rows {
  static constexpr int R = kRowsAtOnce<A>;

  const S* from[kWidth<A>];  // in the order of fold's inputs
  const int64_t position, positions;
  const int64_t along;  // so many of them are taken along the rows, the few others as columns
  const S* const end;   // of the sample

  // offsets[i]: of fold's input i.
  Rows(const Sample<S>& x, int64_t channel, const int64_t* offsets, int64_t position_)
      : position(position_), positions(std::min(kRowPositions<A>, x.positions - position)),
        along(positions % kLanes<A> <= kFewColumns ? positions / kLanes<A> * kLanes<A> : positions),
        end(x.at(x.channels - 1, 0) + x.positions) {
    const S* first = x.at(channel, position);
    for (int64_t i = 0; i < kWidth<A>; ++i) from[i] = first + offsets[i];
  }

  // visit(p, vectors, the lanes to count) for the vectors at p = part * width, and every kLanes further, of kRowsAtOnce
  // rows that are fold's inputs from `in` on. The other lanes hold anything.
  template <bool kBackwards = false, typename Visit>
  void walk(int in, int part, const Visit& visit) const {
    const int64_t begin = part * kWidth<A>;
    const int64_t tail = begin + (along - begin + kLanes<A> - kWidth<A>) / kLanes<A> * kLanes<A>;
    if (kBackwards && tail < along) visit_tail(in, tail, visit);
    for (int64_t i = begin; i < tail; i += kLanes<A>) {
      const int64_t p = kBackwards ? begin + tail - kLanes<A> - i : i;
      Vector<A> x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = loaded_once(load_as<A>(from[in + r] + p));
      visit(p, x, AllLanes());
    }
    if (!kBackwards && tail < along) visit_tail(in, tail, visit);
  }

  // Lane r: what row r has at p.
  Vector<A> column(int64_t p) const {
    S numbers[kWidth<A>];
    for (int i = 0; i < kWidth<A>; ++i) numbers[row_of<A>(i)] = from[i][p];
    return load_as<A>(numbers);
  }

 private:
  template <typename Visit>
  void visit_tail(int in, int64_t p, const Visit& visit) const {
    const int64_t count = along - p;
    Vector<A> x[R];
    if (end - (from[in + R - 1] + p) >= kWidth<A>) {
      // What lies behind a row is the next one.
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load_as<A>(from[in + r] + p);
    } else {
      for (int r = 0; r < R; ++r) x[r] = load_some_as<A>(from[in + r] + p, count);
    }
    visit(p, x, FirstLanes<A>{iota<A>() < broadcast_index<A>(count)});
  }
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
