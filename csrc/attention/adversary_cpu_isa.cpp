#include "head_cpu_columns.h"
#include "refine_cpu_rows.h"

namespace dan_fast::DAN_FAST_ISA {

template <typename S, typename A>
void adversary(
    const FeatureMap<const S>& features, const FeatureMap<const S>& refined, const AdversaryInput<A>& in,
    const Adversary<A>& out, int64_t first, int64_t last) {
  const int64_t channels = features.channels, positions = features.positions;
  Scratch<A> ones(channels);
  std::fill_n(ones.numbers, channels, A(1));
  for (int64_t b = first; b < last; ++b) {
    A *refined_map = out.refined_map + b * positions, *adversary_map = out.adversary_map + b * positions;
    PositionSums<A, false>({ones.numbers, refined_map, nullptr, nullptr, nullptr, nullptr}).run(Sample<S>(refined, b));
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
    const FeatureMap<S>& features_grad, const AdversaryInputGrad<A>& out, int64_t first, int64_t last) {
  const bool flipped = rows_are_positions(features, features_grad);
  const int64_t channels = features.channels, positions = features.positions;
  Scratch<A> chain(channels), adversary_map_grad(positions);
  A* const by_map = adversary_map_grad.numbers;
  for (int64_t b = first; b < last; ++b) {
    const bool labelled = in.labels[b] >= 0;
    for (int64_t p = 0; p < positions; ++p) {
      const int64_t at = b * positions + p;
      const AdversaryGrad<A> grad = adversary_maps_grad(saved, labelled, b, at);
      out.refined_map[at] = grad.refined;
      by_map[p] = grad.adversary;
    }
    const A* rows = in.rows + b * channels;
    A* by_rows = out.rows + b * channels;
    const MapRows<const S> x(features, b, flipped);
    const MapRows<S> to(features_grad, b, flipped);
    const auto term = [&](int64_t row, int64_t column, int64_t left, Vector<A> row_weight, Vector<A> column_weights) {
      store_up_to<A>(to.at(row, column), row_weight * column_weights, left);
      return load_up_to<A>(x.at(row, column), left);
    };
    if (flipped) {
      walk_rows<false, true>(
          RowWeights<A>{positions, channels, by_map, rows}, RowSums<A>{nullptr, by_rows, chain.numbers}, term);
    } else {
      walk_rows<true, false>(
          RowWeights<A>{channels, positions, rows, by_map}, RowSums<A>{by_rows, nullptr, nullptr}, term);
    }
    // 0 X is not 0 for every X.
    if (!labelled) std::fill_n(by_rows, channels, A(0));
  }
}

#define DAN_FAST_INSTANTIATE(S, A)                                                                                   \
  template void adversary<S, A>(                                                                                     \
      const FeatureMap<const S>&, const FeatureMap<const S>&, const AdversaryInput<A>&, const Adversary<A>&, int64_t, \
      int64_t);                                                                                                      \
  template void adversary_backward<S, A>(                                                                            \
      const FeatureMap<const S>&, const AdversaryInput<A>&, const AdversarySaved<A>&, const FeatureMap<S>&,          \
      const AdversaryInputGrad<A>&, int64_t, int64_t);
DAN_FAST_INSTANTIATE(double, double)
DAN_FAST_INSTANTIATE(float, float)
DAN_FAST_INSTANTIATE(BFloat16, float)
DAN_FAST_INSTANTIATE(Float16, float)

}  // namespace dan_fast::DAN_FAST_ISA
