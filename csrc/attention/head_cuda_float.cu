// Maps of float, and which file's kernels serve a map.
#include "head_cuda_launch.cuh"

namespace dan_fast {

template struct HeadKernels<float>;
extern template struct HeadKernels<double>;
extern template struct HeadKernels<__half>;
extern template struct HeadKernels<__nv_bfloat16>;

namespace {

// call(HeadKernels<S>{}) for the dtype of the map, which must be one with statistics in A.
template <typename A, typename Call>
int for_scalar(Scalar scalar, const Call& call) {
  if constexpr (std::is_same_v<A, double>) {
    if (scalar == Scalar::kFloat64) return call(HeadKernels<double>{});
  } else {
    if (scalar == Scalar::kFloat32) return call(HeadKernels<float>{});
    if (scalar == Scalar::kFloat16) return call(HeadKernels<__half>{});
    if (scalar == Scalar::kBFloat16) return call(HeadKernels<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <typename A>
int launch_head_pool(const AnyFeatureMap& map, const Pooled<A>& out, void* stream) {
  return for_scalar<A>(map.scalar, [&](auto kernels) { return kernels.pool(map, out, stream); });
}

int head_workspace_bytes(const AnyFeatureMap& map, int64_t hidden, int64_t* bytes) {
  const auto ask = [&](auto kernels) { return kernels.workspace_bytes(map, hidden, bytes); };
  return map.scalar == Scalar::kFloat64 ? for_scalar<double>(map.scalar, ask) : for_scalar<float>(map.scalar, ask);
}

template <typename A>
int launch_head_attend(
    const AnyFeatureMap& map, const AttendInput<A>& in, const Attended<A>& out, void* workspace, void* stream) {
  return for_scalar<A>(map.scalar, [&](auto kernels) { return kernels.attend(map, in, out, workspace, stream); });
}

template <typename A>
int launch_head_attend_backward(
    const AnyFeatureMap& map,
    const AttendInput<A>& in,
    const Saved<A>& saved,
    const AttendedGrad<A>& grad,
    const AttendInputGrad<A>& out,
    void* workspace,
    void* stream) {
  return for_scalar<A>(map.scalar, [&](auto kernels) {
    return kernels.attend_backward(map, in, saved, grad, out, workspace, stream);
  });
}

template <typename A>
int launch_head_features_backward(const AnyFeatureMap& map, const FeaturesGradInput<A>& in, void* stream) {
  return for_scalar<A>(map.scalar, [&](auto kernels) { return kernels.features_backward(map, in, stream); });
}

#define DAN_FAST_HEAD_LAUNCHES(A)                                                                                  \
  template int launch_head_pool(const AnyFeatureMap&, const Pooled<A>&, void*);                                    \
  template int launch_head_attend(const AnyFeatureMap&, const AttendInput<A>&, const Attended<A>&, void*, void*);  \
  template int launch_head_attend_backward(                                                                        \
      const AnyFeatureMap&, const AttendInput<A>&, const Saved<A>&, const AttendedGrad<A>&, const AttendInputGrad<A>&, \
      void*, void*);                                                                                               \
  template int launch_head_features_backward(const AnyFeatureMap&, const FeaturesGradInput<A>&, void*);
DAN_FAST_HEAD_LAUNCHES(float)
DAN_FAST_HEAD_LAUNCHES(double)
#undef DAN_FAST_HEAD_LAUNCHES

}  // namespace dan_fast
