// Augmentation of a batch of images, as dan_fast/data/images/augment.py says it in PyTorch and to the same bits. An
// image is read and written in two passes over its rows: up to the change of contrast, which needs the mean grey of the
// image, and from there to the normalised numbers. Plain C++17.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"

namespace dan_fast {

constexpr int64_t kBrightness = 0, kContrast = 1, kSaturation = 2, kChanges = 3;

// Every array is contiguous.
struct Images {
  int64_t count, height, width;
  const uint8_t* levels;  // (n, 3, H, W)
  const float* mean;      // (3,) of levels in [0, 1]
  const float* std;       // (3,)
  float* out;             // (n, 3, H, W)
};

struct ImageDraws {
  int64_t border;        // black pixels around an image before it is cropped
  const uint8_t* flip;   // (n,)
  const int64_t* top;    // (n,) in [0, 2 border]
  const int64_t* left;   // (n,) in [0, 2 border]
  const int64_t* order;  // (n, 3) in [0, 3)
  const float* factors;  // (n, 3)
};

// Images [first, last).
#define DAN_FAST_DECLARE_IMAGES(isa)                                                                 \
  namespace isa {                                                                                    \
  void augment_images(const Images& images, const ImageDraws& draws, int64_t first, int64_t last);   \
  void normalize_images(const Images& images, int64_t first, int64_t last);                          \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_IMAGES)
#undef DAN_FAST_DECLARE_IMAGES

}  // namespace dan_fast
