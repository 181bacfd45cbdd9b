// Work that is shared among threads, however the caller makes them.
#pragma once

#include <cstdint>

namespace dan_fast {

// Runs task(context, first, last) over pieces of [0, count), none smaller than `grain` without need, maybe at the same
// time, and returns when all are done.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context);

}  // namespace dan_fast
