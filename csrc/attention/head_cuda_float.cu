// Maps of float, and which file's kernels serve a map.
#include "head_cuda_launch.cuh"

namespace dan_fast {

template struct HeadWeightKernels<float>;
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
int head_workspace_bytes(Scalar scalar, const HeadInput<void, A>& in, bool backward, int64_t* bytes) {
  return for_scalar<A>(scalar, [&](auto kernels) { return kernels.workspace_bytes(in, backward, bytes); });
}

template <typename A>
int launch_head_forward(
    Scalar scalar, const HeadInput<void, A>& in, const HeadOutput<A>& out, void* workspace, void* stream) {
  return for_scalar<A>(scalar, [&](auto kernels) { return kernels.forward(in, out, workspace, stream); });
}

template <typename A>
int launch_head_backward(
    Scalar scalar,
    const HeadInput<void, A>& in,
    const HeadSaved<A>& saved,
    const HeadGrad<A>& grad,
    const HeadInputGrad<void, A>& out,
    void* workspace,
    void* stream) {
  return for_scalar<A>(scalar, [&](auto kernels) { return kernels.backward(in, saved, grad, out, workspace, stream); });
}

#define DAN_FAST_HEAD_LAUNCHES(A)                                                                                  \
  template int head_workspace_bytes(Scalar, const HeadInput<void, A>&, bool, int64_t*);                            \
  template int launch_head_forward(Scalar, const HeadInput<void, A>&, const HeadOutput<A>&, void*, void*);         \
  template int launch_head_backward(                                                                               \
      Scalar, const HeadInput<void, A>&, const HeadSaved<A>&, const HeadGrad<A>&, const HeadInputGrad<void, A>&,   \
      void*, void*);
DAN_FAST_HEAD_LAUNCHES(float)
DAN_FAST_HEAD_LAUNCHES(double)
#undef DAN_FAST_HEAD_LAUNCHES

}  // namespace dan_fast
