#include "head_cuda_launch.cuh"

namespace dan_fast {

template struct HeadKernels<__half>;

}  // namespace dan_fast
