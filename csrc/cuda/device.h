// Whether a device runs the kernels of this library. Plain C++.
#pragma once

namespace dan_fast {

// Null if the current device and its driver can run them, else CUDA's reason.
const char* why_kernels_cannot_run();

}  // namespace dan_fast
