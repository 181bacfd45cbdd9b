#include "refine_cuda_launch.cuh"

namespace dan_fast {

template struct RefineKernels<double>;

}  // namespace dan_fast
