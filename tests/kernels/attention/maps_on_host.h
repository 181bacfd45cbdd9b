// What the feature maps of a kernel are made of on the host, and memory that was not written to.
#pragma once

#include "../cuda_on_host.h"

struct Brain {
  uint16_t bits;
  Brain() = default;
  explicit Brain(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    bits = value != value ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
};

// What a kernel finds in memory that nothing was written to: NaN, an index far out. Aligned to 16 bytes.
class Rubbish {
 public:
  explicit Rubbish(int64_t bytes) : bytes_(new unsigned char[static_cast<size_t>(bytes)]) {
    std::memset(bytes_.get(), 0xff, static_cast<size_t>(bytes));
  }
  unsigned char* get() { return bytes_.get(); }

 private:
  std::unique_ptr<unsigned char[]> bytes_;
};
