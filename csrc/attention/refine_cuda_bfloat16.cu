#include "refine_cuda_launch.cuh"

namespace dan_fast {

template struct RefineKernels<__nv_bfloat16>;

}  // namespace dan_fast
