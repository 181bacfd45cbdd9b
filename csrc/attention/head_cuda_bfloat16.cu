#include "head_cuda_launch.cuh"

namespace dan_fast {

extern template struct HeadWeightKernels<float>;
template struct HeadKernels<__nv_bfloat16>;

}  // namespace dan_fast
