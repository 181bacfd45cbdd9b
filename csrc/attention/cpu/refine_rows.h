// One pass over maps of one sample on the CPU, in the order in which they lie, that may add up what it sees both ways.
// As internal to an instruction set as head_tile.h.
#pragma once

#include "head_tile.h"
#include "refine_passes.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// Whether a sample's rows of adjacent numbers are its positions; else they are its channels.
template <typename... Maps>
inline bool rows_are_positions(const Maps&... maps) {
  return (... && (maps.channel_stride == 1 && maps.channels > 1));
}

template <typename S>
struct MapRows {
  S* data;
  int64_t stride;

  MapRows(const FeatureMap<S>& map, int64_t sample, bool positions)
      : data(map.data + sample * map.sample_stride), stride(positions ? map.position_stride : map.channel_stride) {}

  S* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

struct EveryLane {
  template <typename V>
  V operator()(V values) const {
    return values;
  }
};

// The lanes of a vector that goes back to end with its row, those aside that the vector before had.
template <typename A>
struct NewLanes {
  Indices<A> mask;
  Vector<A> operator()(Vector<A> values) const { return mask ? values : Vector<A>{}; }
};

// visit(part of kLanes, column, columns left, the lanes to count) for the vectors of a row.
template <typename A, typename Visit>
inline void for_columns(int64_t columns, const Visit& visit) {
  int64_t whole = 0;
  for (; whole + kLanes<A> <= columns; whole += kLanes<A>) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts<A>; ++part) visit(part, whole + part * kWidth<A>, kWidth<A>, EveryLane{});
  }
  if (whole == columns) return;
  const int64_t begin = std::max<int64_t>(0, columns - kLanes<A>);
  for (int part = 0; part < kParts<A>; ++part) {
    const int64_t at = begin + part * kWidth<A>;
    if (at >= columns) break;
    if (at + kWidth<A> <= whole) continue;
    const Indices<A> index = broadcast_index<A>(at) + iota<A>();
    visit(part, at, columns - at, NewLanes<A>{index >= broadcast_index<A>(whole)});
  }
}

template <typename A>
struct RowWeights {
  int64_t rows, columns;
  const A* of_rows;     // (rows,)
  const A* of_columns;  // (columns,)
};

// The two sums over the terms t_rc of a pass.
template <typename A>
struct RowSums {
  A* of_rows;     // (rows,) sum over c of t_rc times the weight of column c
  A* of_columns;  // (columns,) sum over r of t_rc times the weight of row r
  A* chain;       // (columns,) scratch of the latter
};

// term(row, column, columns left, weight of the row, weights of the columns) is called once for every vector of numbers
// but where a row ends within one: there two of them may overlap.
template <bool kOfRows, bool kOfColumns, typename A, typename Term>
void walk_rows(const RowWeights<A>& weights, const RowSums<A>& sums, const Term& term) {
  const int64_t columns = weights.columns;
  if constexpr (kOfColumns) std::fill_n(sums.of_columns, columns, A(0));
  for (int64_t begin = 0; begin < weights.rows; begin += kChain) {
    const int64_t end = std::min(weights.rows, begin + kChain);
    if constexpr (kOfColumns) std::fill_n(sums.chain, columns, A(0));
    for (int64_t row = begin; row < end; ++row) {
      const Vector<A> row_weight = broadcast(weights.of_rows[row]);
      Vector<A> totals[kParts<A>] = {};
      for_columns<A>(columns, [&](int part, int64_t column, int64_t left, const auto& counted) {
        const Vector<A> column_weights = load_up_to<A>(weights.of_columns + column, left);
        const Vector<A> value = counted(term(row, column, left, row_weight, column_weights));
        if constexpr (kOfRows) totals[part] = totals[part] + value * column_weights;
        if constexpr (kOfColumns) {
          A* to = sums.chain + column;
          store_up_to<A>(to, load_up_to<A>(to, left) + value * row_weight, left);
        }
      });
      if constexpr (kOfRows) {
        A lanes[kLanes<A>];
        std::memcpy(lanes, totals, sizeof lanes);
        sums.of_rows[row] = add_halves<kLanes<A>>(lanes);
      }
    }
    if constexpr (kOfColumns) add_multiple(columns, A(1), sums.chain, sums.of_columns);
  }
}

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
