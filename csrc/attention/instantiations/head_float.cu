#include "../cuda/head_launch.cuh"

namespace dan_fast {

template struct HeadWeightKernels<float>;
template struct HeadCuda<float>;

}  // namespace dan_fast
