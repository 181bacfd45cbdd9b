#include "refine_rows.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

// refine() with the attentions in the order of the equation whatever the rows are, so that both layouts
// have the same bits.
template <typename A>
inline Vector<A> refine_in_rows(Vector<A> x, Vector<A> of_row, Vector<A> of_columns, bool rows_are_positions) {
  return rows_are_positions ? refine(x, of_columns, of_row) : refine(x, of_row, of_columns);
}

template <typename A>
RowWeights<A> weights_of(const Attentions<A>& in, int64_t channels, int64_t positions, int64_t sample, bool flipped) {
  const A *channel = in.channel + sample * channels, *spatial = in.spatial + sample * positions;
  if (flipped) return {positions, channels, spatial, channel};
  return {channels, positions, channel, spatial};
}

}  // namespace

template <typename S, typename A>
void refine_map(
    const FeatureMap<const S>& features, const Attentions<A>& in, const FeatureMap<S>& refined, int64_t first,
    int64_t last) {
  const bool flipped = rows_are_positions(features, refined);
  for (int64_t b = first; b < last; ++b) {
    const MapRows<const S> from(features, b, flipped);
    const MapRows<S> to(refined, b, flipped);
    const RowWeights<A> weights = weights_of(in, features.channels, features.positions, b, flipped);
    walk_rows<false, false>(
        weights, RowSums<A>{},
        [&](int64_t row, int64_t column, int64_t left, Vector<A> row_weight, Vector<A> column_weights) {
          const Vector<A> x = load_up_to<A>(from.at(row, column), left);
          store_up_to<A>(to.at(row, column), refine_in_rows<A>(x, row_weight, column_weights, flipped), left);
          return x;
        });
  }
}

template <typename S, typename A>
void refine_map_backward(
    const FeatureMap<const S>& features, const Attentions<A>& in, const FeatureMap<const S>& grad_refined,
    const FeatureMap<S>& grad_features, const AttentionGrads<A>& out, int64_t first, int64_t last) {
  const bool flipped = rows_are_positions(features, grad_refined, grad_features);
  const int64_t channels = features.channels, positions = features.positions;
  Scratch<A> chain(flipped ? channels : positions);
  for (int64_t b = first; b < last; ++b) {
    const MapRows<const S> x(features, b, flipped), upstream(grad_refined, b, flipped);
    const MapRows<S> to(grad_features, b, flipped);
    A *grad_channel = out.channel + b * channels, *grad_spatial = out.spatial + b * positions;
    walk_rows<true, true>(
        weights_of(in, channels, positions, b, flipped),
        RowSums<A>{flipped ? grad_spatial : grad_channel, flipped ? grad_channel : grad_spatial, chain.get()},
        [&](int64_t row, int64_t column, int64_t left, Vector<A> row_weight, Vector<A> column_weights) {
          const Vector<A> grad = load_up_to<A>(upstream.at(row, column), left);
          store_up_to<A>(to.at(row, column), refine_in_rows<A>(grad, row_weight, column_weights, flipped), left);
          return load_up_to<A>(x.at(row, column), left) * grad;
        });
  }
}

#define DAN_FAST_INSTANTIATE(S, A)                                                                                  \
  template void refine_map<S, A>(                                                                                   \
      const FeatureMap<const S>&, const Attentions<A>&, const FeatureMap<S>&, int64_t, int64_t);                    \
  template void refine_map_backward<S, A>(                                                                          \
      const FeatureMap<const S>&, const Attentions<A>&, const FeatureMap<const S>&, const FeatureMap<S>&,           \
      const AttentionGrads<A>&, int64_t, int64_t);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast::DAN_FAST_ISA
