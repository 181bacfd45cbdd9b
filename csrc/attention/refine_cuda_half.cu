#include "refine_cuda_launch.cuh"

namespace dan_fast {

template struct RefineKernels<__half>;

}  // namespace dan_fast
