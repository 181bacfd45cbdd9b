// Maps of float, and which file's kernels serve a map.
#include "refine_cuda_launch.cuh"

namespace dan_fast {

template struct RefineKernels<float>;
extern template struct RefineKernels<double>;
extern template struct RefineKernels<__half>;
extern template struct RefineKernels<__nv_bfloat16>;

namespace {

// call(RefineKernels<S>{}) for the dtype of the map, which must be one with statistics in A.
template <typename A, typename Call>
int for_scalar(const AnyFeatureMap& map, const Call& call) {
  if constexpr (std::is_same_v<A, double>) {
    if (map.scalar == Scalar::kFloat64) return call(RefineKernels<double>{});
  } else {
    if (map.scalar == Scalar::kFloat32) return call(RefineKernels<float>{});
    if (map.scalar == Scalar::kFloat16) return call(RefineKernels<__half>{});
    if (map.scalar == Scalar::kBFloat16) return call(RefineKernels<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <typename A>
int launch_refine(const AnyFeatureMap& features, const Attentions<A>& in, const AnyFeatureMap& refined, void* stream) {
  return for_scalar<A>(features, [&](auto kernels) {
    return kernels.refine(features, in, refined, static_cast<cudaStream_t>(stream));
  });
}

template <typename A>
int launch_refine_backward(
    const AnyFeatureMap& features, const Attentions<A>& in, const AnyFeatureMap& refined_grad,
    const AnyFeatureMap& features_grad, const AttentionGrads<A>& out, A* partial, void* stream) {
  return for_scalar<A>(features, [&](auto kernels) {
    return kernels.refine_backward(
        features, in, refined_grad, features_grad, out, partial, static_cast<cudaStream_t>(stream));
  });
}

template <typename A>
int launch_adversary(
    const AnyFeatureMap& features, const AnyFeatureMap& refined, const AdversaryInput<A>& in, const Adversary<A>& out,
    A* partial, void* stream) {
  return for_scalar<A>(features, [&](auto kernels) {
    return kernels.adversary(features, refined, in, out, partial, static_cast<cudaStream_t>(stream));
  });
}

template <typename A>
int launch_adversary_backward(
    const AnyFeatureMap& features, const AdversaryInput<A>& in, const AdversarySaved<A>& saved,
    const AnyFeatureMap& features_grad, const AdversaryInputGrad<A>& out, void* stream) {
  return for_scalar<A>(features, [&](auto kernels) {
    return kernels.adversary_backward(features, in, saved, features_grad, out, static_cast<cudaStream_t>(stream));
  });
}

#define DAN_FAST_REFINE_LAUNCHES(A)                                                                                  \
  template int launch_refine(const AnyFeatureMap&, const Attentions<A>&, const AnyFeatureMap&, void*);               \
  template int launch_refine_backward(                                                                               \
      const AnyFeatureMap&, const Attentions<A>&, const AnyFeatureMap&, const AnyFeatureMap&,                        \
      const AttentionGrads<A>&, A*, void*);                                                                          \
  template int launch_adversary(                                                                                     \
      const AnyFeatureMap&, const AnyFeatureMap&, const AdversaryInput<A>&, const Adversary<A>&, A*, void*);         \
  template int launch_adversary_backward(                                                                            \
      const AnyFeatureMap&, const AdversaryInput<A>&, const AdversarySaved<A>&, const AnyFeatureMap&,                \
      const AdversaryInputGrad<A>&, void*);
DAN_FAST_REFINE_LAUNCHES(float)
DAN_FAST_REFINE_LAUNCHES(double)
#undef DAN_FAST_REFINE_LAUNCHES

}  // namespace dan_fast
