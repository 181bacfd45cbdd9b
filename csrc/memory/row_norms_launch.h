// What the bindings see of the CUDA row norms. Plain C++, so that they compile without the CUDA headers.
#pragma once

#include <cstdint>

namespace dan_fast {

enum class Scalar { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Launches on `stream` (a cudaStream_t) of the current device and does not wait. `norms` is double for kFloat64
// and float for the rest. Returns a cudaError_t.
int launch_row_sq_norms(
    Scalar scalar,
    const void* features,
    int64_t row_stride,
    int64_t rows,
    int64_t columns,
    void* norms,
    void* stream);

// Null if this device and its driver can run these kernels, else CUDA's reason.
const char* why_kernels_cannot_run(int device);

}  // namespace dan_fast
