#include "../cuda/head_launch.cuh"

namespace dan_fast {

template struct HeadWeightKernels<double>;
template struct HeadCuda<double>;

}  // namespace dan_fast
