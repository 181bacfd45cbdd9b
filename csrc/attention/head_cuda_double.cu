#include "head_cuda_launch.cuh"

namespace dan_fast {

template struct HeadWeightKernels<double>;
template struct HeadKernels<double>;

}  // namespace dan_fast
