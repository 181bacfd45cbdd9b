#include "scan_cuda_launch.cuh"

namespace dan_fast {

DAN_FAST_SCAN_LAUNCHES(double)

}  // namespace dan_fast
