#include "scan_cuda_launch.cuh"

namespace dan_fast {

template int scan_workspace_bytes<double>(const ScanSizes&, int64_t*);
template int launch_scan_forward(const ScanInput<double>&, const ScanOutput<double>&, void*, void*);
template int launch_scan_backward(
    const ScanInput<double>&, const ScanOutput<double>&, const ScanGradient<double>&, void*, void*);

}  // namespace dan_fast
