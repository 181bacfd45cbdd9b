// How much the cache holds that a CPU's cores share.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace dan_fast {

// Bytes; 0 where the system does not say.
inline int64_t shared_cache_bytes() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? bytes : 0;
#else
  return 0;
#endif
}

}  // namespace dan_fast
