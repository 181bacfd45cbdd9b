// Sums over the channels at every position of a sample on the CPU. As internal to an instruction set as
// head_tile.h.
#pragma once

#include "head_tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

template <typename A>
struct PositionMaps {
  const A* weights;       // (C,)
  A* sums;                // (P,) sum over c of weight_c X_c
  const A* rows;          // (C,)
  A* row_sums;            // (P,) sum over c of row_c X_c
  A* peak;                // (P,) the largest weight_c X_c
  int32_t* peak_channel;  // (P,) and its first channel
};

// Without kPeak, the first sum only.
template <typename A, bool kPeak>
class PositionSums : PositionMaps<A> {
 public:
  explicit PositionSums(const PositionMaps<A>& maps) : PositionMaps<A>(maps) {}

  template <typename S>
  void run(const Sample<S>& x) const {
    if (x.channels_adjacent()) {
      constexpr int kTogether = std::max(1, kVectors / kParts<A>);
      int64_t position = 0;
      for (; position + kTogether <= x.positions; position += kTogether) across<kTogether>(x, position);
      for (; position < x.positions; ++position) across<1>(x, position);
    } else if (x.positions < kWidth<A>) {
      along<1, true>(x, 0);
    } else {
      int64_t position = 0;
      for (; position + (kVectors - 1) * kWidth<A> < x.positions; position += kVectors * kWidth<A>) {
        along<kVectors, false>(x, position);
      }
      for (; position < x.positions; position += kWidth<A>) along<1, false>(x, position);
    }
  }

 private:
  using PositionMaps<A>::weights, PositionMaps<A>::sums, PositionMaps<A>::rows, PositionMaps<A>::row_sums;
  using PositionMaps<A>::peak, PositionMaps<A>::peak_channel;

  static constexpr A kLowest = -std::numeric_limits<A>::infinity();

  template <int V>
  struct State {
    Vector<A> totals[V] = {}, row_totals[V] = {}, sums[V] = {}, row_sums[V] = {}, best[V];
    Indices<A> lead[V] = {};

    State() { std::fill_n(best, V, broadcast(kLowest)); }

    void add(int v, Vector<A> x, Vector<A> weight, Vector<A> row, Indices<A> index) {
      const Vector<A> product = weight * x;
      sums[v] = sums[v] + product;
      if constexpr (kPeak) {
        const Indices<A> leads = lanes_that_lead<A>(product, best[v]);
        best[v] = leads ? product : best[v];
        lead[v] = leads ? index : lead[v];
        row_sums[v] = row_sums[v] + row * x;
      }
    }

    void end_chain() {
      for (int v = 0; v < V; ++v) {
        totals[v] = totals[v] + sums[v];
        sums[v] = Vector<A>{};
        row_totals[v] = row_totals[v] + row_sums[v];
        row_sums[v] = Vector<A>{};
      }
    }
  };

  // V vectors of adjacent positions; the last one goes back where it would go beyond the end.
  template <int V, bool kFew, typename S>
  void along(const Sample<S>& x, int64_t position) const {
    int64_t offsets[V];
    for (int v = 0; v < V; ++v) {
      offsets[v] = kFew ? 0 : std::min(position + v * kWidth<A>, x.positions - kWidth<A>);
    }
    [[maybe_unused]] const S* end = x.at(x.channels - 1, 0) + x.positions;
    State<V> state;
    for (int64_t begin = 0; begin < x.channels; begin += kChain) {
      const int64_t chain_end = std::min(x.channels, begin + kChain);
      for (int64_t channel = begin; channel < chain_end; ++channel) {
        const S* from = x.at(channel, 0);
        prefetch_ahead(from + offsets[0], V * kWidth<A> * static_cast<int64_t>(sizeof(S)));
        const Vector<A> weight = broadcast(weights[channel]);
        const Vector<A> row = kPeak ? broadcast(rows[channel]) : weight;
        const Indices<A> index = broadcast_index<A>(channel);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          // What lies behind a short row is the next one: those lanes are not stored.
          const Vector<A> values = !kFew || end - from >= kWidth<A> ? load_as<A>(from + offsets[v])
                                                                     : load_some_as<A>(from, x.positions);
          state.add(v, loaded_once(values), weight, row, index);
        }
      }
      state.end_chain();
    }
    for (int v = 0; v < V; ++v) {
      store_up_to<A>(sums + offsets[v], state.totals[v], x.positions);
      if constexpr (kPeak) {
        store_up_to<A>(row_sums + offsets[v], state.row_totals[v], x.positions);
        store_up_to<A>(peak + offsets[v], state.best[v], x.positions);
        const int64_t count = std::min(kWidth<A>, x.positions);
        for (int64_t i = 0; i < count; ++i) peak_channel[offsets[v] + i] = static_cast<int32_t>(state.lead[v][i]);
      }
    }
  }

  // `R` positions, kLanes adjacent channels of each at a time.
  template <int R, typename S>
  void across(const Sample<S>& x, int64_t position) const {
    const int64_t whole = x.channels / kLanes<A> * kLanes<A>;
    const Indices<A> first_lanes = iota<A>();
    State<R * kParts<A>> state;
    for (int64_t begin = 0; begin < whole; begin += kChain * kLanes<A>) {
      const int64_t chain_end = std::min(whole, begin + kChain * kLanes<A>);
      for (int64_t channel = begin; channel < chain_end; channel += kLanes<A>) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts<A>; ++part) {
          const int64_t at = channel + part * kWidth<A>;
          const Vector<A> weight = load(weights + at);
          const Vector<A> row = kPeak ? load(rows + at) : weight;
          const Indices<A> index = broadcast_index<A>(at) + first_lanes;
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            prefetch_ahead(x.at(at, position + r), kWidth<A> * static_cast<int64_t>(sizeof(S)));
            state.add(r * kParts<A> + part, loaded_once(load_as<A>(x.at(at, position + r))), weight, row, index);
          }
        }
      }
      state.end_chain();
    }
    for (int r = 0; r < R; ++r) {
      Lanes lanes;
      std::memcpy(lanes.sums, state.totals + r * kParts<A>, sizeof lanes.sums);
      std::memcpy(lanes.row_sums, state.row_totals + r * kParts<A>, sizeof lanes.row_sums);
      std::memcpy(lanes.best, state.best + r * kParts<A>, sizeof lanes.best);
      std::memcpy(lanes.lead, state.lead + r * kParts<A>, sizeof lanes.lead);
      for (int64_t channel = whole; channel < x.channels; ++channel) {
        const A value = load_one<A>(x.at(channel, position + r));
        lanes.add(channel - whole, value, weights[channel], kPeak ? rows[channel] : A(0), channel);
      }
      sums[position + r] = add_halves<kLanes<A>>(lanes.sums);
      if constexpr (kPeak) {
        row_sums[position + r] = add_halves<kLanes<A>>(lanes.row_sums);
        lanes.peak(peak[position + r], peak_channel[position + r]);
      }
    }
  }

  struct Lanes {
    A sums[kLanes<A>], row_sums[kLanes<A>], best[kLanes<A>];
    IndexOf<A> lead[kLanes<A>];

    void add(int64_t lane, A x, A weight, A row, int64_t channel) {
      const A product = weight * x;
      sums[lane] += product;
      row_sums[lane] += row * x;
      if (!takes_the_lead(product, best[lane])) return;
      best[lane] = product;
      lead[lane] = static_cast<IndexOf<A>>(channel);
    }

    void peak(A& value, int32_t& channel) const {
      A top = best[0];
      IndexOf<A> first = lead[0];
      for (int64_t lane = 1; lane < kLanes<A>; ++lane) {
        const bool tie = best[lane] == top || (best[lane] != best[lane] && top != top);
        if (!takes_the_lead(best[lane], top) && !(tie && lead[lane] < first)) continue;
        top = best[lane];
        first = lead[lane];
      }
      value = top;
      channel = static_cast<int32_t>(first);
    }
  };
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
