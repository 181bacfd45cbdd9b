#include "head_cuda_launch.cuh"

namespace dan_fast {

extern template struct HeadWeightKernels<float>;
template struct HeadKernels<__half>;

}  // namespace dan_fast
