#include "../cuda/refine_launch.cuh"

namespace dan_fast {

template struct RefineCuda<double>;

}  // namespace dan_fast
