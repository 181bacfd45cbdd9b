#include "scan_cuda_launch.cuh"

namespace dan_fast {

template int scan_workspace_bytes<float>(const ScanSizes&, int64_t*);
template int launch_scan_forward(const ScanInput<float>&, const ScanOutput<float>&, void*, void*);
template int launch_scan_backward(
    const ScanInput<float>&, const ScanOutput<float>&, const ScanGradient<float>&, void*, void*);

}  // namespace dan_fast
