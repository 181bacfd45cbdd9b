#include "../cuda/refine_launch.cuh"

namespace dan_fast {

template struct RefineCuda<BFloat16>;

}  // namespace dan_fast
