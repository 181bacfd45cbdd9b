// How kernels divide the memory that a caller lends them. Plain C++.
#pragma once

#include <cstdint>

#include "../common/math.h"

namespace dan_fast {

// Arrays one after the other from `base`, each on a multiple of 256 bytes. From null all are null: that only counts.
class Arena {
 public:
  explicit Arena(void* base) : start_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t size) {
    char* const at = start_ == nullptr ? nullptr : start_ + bytes_;
    bytes_ += round_up(size * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(at);
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* const start_;
  int64_t bytes_ = 0;
};

}  // namespace dan_fast
