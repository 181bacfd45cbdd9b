#include "head_columns.h"
#include "refine_rows.h"

namespace dan_fast::DAN_FAST_ISA {

template <typename S, typename A>
void adversary(
    const FeatureMap<const S>& features, const FeatureMap<const S>& refined, const AdversaryInput<A>& in,
    const Adversary<A>& out, int64_t first, int64_t last) {
  const int64_t channels = features.channels, positions = features.positions;
  Scratch<A> ones(channels);
  std::fill_n(ones.get(), channels, A(1));
  for (int64_t b = first; b < last; ++b) {
    A *refined_map = out.refined_map + b * positions, *adversary_map = out.adversary_map + b * positions;
    PositionSums<A, false>({ones.get(), refined_map, nullptr, nullptr, nullptr, nullptr}).run(Sample<S>(refined, b));
    for (int64_t p = 0; p < positions; ++p) refined_map[p] /= static_cast<A>(channels);
    A loss = 0;
    if (in.labels[b] >= 0) {
      PositionSums<A, false>({in.rows + b * channels, adversary_map, nullptr, nullptr, nullptr, nullptr})
          .run(Sample<S>(features, b));
      for (int64_t p = 0; p < positions; ++p) loss += adversary_term(refined_map[p], adversary_map[p]);
    } else {
      std::fill_n(adversary_map, positions, A(0));
    }
    out.loss[b] = loss;
  }
}

template <typename S, typename A>
void adversary_backward(
    const FeatureMap<const S>& features, const AdversaryInput<A>& in, const AdversarySaved<A>& saved,
    const FeatureMap<S>& grad_features, const AdversaryInputGrad<A>& out, int64_t first, int64_t last) {
  const bool flipped = rows_are_positions(features, grad_features);
  const int64_t channels = features.channels, positions = features.positions;
  Scratch<A> chain(channels), grad_adversary_map(positions);
  A* const grad_map = grad_adversary_map.get();
  for (int64_t b = first; b < last; ++b) {
    const bool labelled = in.labels[b] >= 0;
    for (int64_t p = 0; p < positions; ++p) {
      const int64_t at = b * positions + p;
      const AdversaryGrad<A> grad = grad_adversary_maps(saved, labelled, b, at);
      out.refined_map[at] = grad.refined;
      grad_map[p] = grad.adversary;
    }
    const A* rows = in.rows + b * channels;
    A* grad_rows = out.rows + b * channels;
    const MapRows<const S> x(features, b, flipped);
    const MapRows<S> to(grad_features, b, flipped);
    const auto term = [&](int64_t row, int64_t column, int64_t left, Vector<A> row_weight, Vector<A> column_weights) {
      store_up_to<A>(to.at(row, column), row_weight * column_weights, left);
      return load_up_to<A>(x.at(row, column), left);
    };
    if (flipped) {
      walk_rows<false, true>(
          RowWeights<A>{positions, channels, grad_map, rows}, RowSums<A>{nullptr, grad_rows, chain.get()}, term);
    } else {
      walk_rows<true, false>(
          RowWeights<A>{channels, positions, rows, grad_map}, RowSums<A>{grad_rows, nullptr, nullptr}, term);
    }
    // 0 X is not 0 for every X.
    if (!labelled) std::fill_n(grad_rows, channels, A(0));
  }
}

#define DAN_FAST_INSTANTIATE(S, A)                                                                                   \
  template void adversary<S, A>(                                                                                     \
      const FeatureMap<const S>&, const FeatureMap<const S>&, const AdversaryInput<A>&, const Adversary<A>&, int64_t, \
      int64_t);                                                                                                      \
  template void adversary_backward<S, A>(                                                                            \
      const FeatureMap<const S>&, const AdversaryInput<A>&, const AdversarySaved<A>&, const FeatureMap<S>&,          \
      const AdversaryInputGrad<A>&, int64_t, int64_t);
DAN_FAST_EACH_STORAGE(DAN_FAST_INSTANTIATE)

}  // namespace dan_fast::DAN_FAST_ISA
