#include "../cuda/refine_launch.cuh"

namespace dan_fast {

template struct RefineCuda<float>;

}  // namespace dan_fast
