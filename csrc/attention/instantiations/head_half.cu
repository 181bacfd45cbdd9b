#include "../cuda/head_launch.cuh"

namespace dan_fast {

extern template struct HeadWeightKernels<float>;
template struct HeadCuda<Float16>;

}  // namespace dan_fast
