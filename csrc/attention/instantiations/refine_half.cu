#include "../cuda/refine_launch.cuh"

namespace dan_fast {

template struct RefineCuda<Float16>;

}  // namespace dan_fast
