// How the operators take a feature map, as an operator of its own: what they read is seen from Python.
#include "../../../python_bindings/feature_maps.h"

STABLE_TORCH_LIBRARY(dan_fast_feature_maps, m) { m.def("readable_map(Tensor features) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(dan_fast_feature_maps, CPU, m) {
  m.impl("readable_map", TORCH_BOX(&dan_fast::readable_map));
}
