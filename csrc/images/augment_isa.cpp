#include "augment.h"

#include <algorithm>

namespace dan_fast::DAN_FAST_ISA {
namespace {

constexpr float kRed = 0.2989f, kGreen = 0.587f, kBlue = 0.114f;  // ITU-R 601-2 as torchvision rounds it
constexpr float kScale = static_cast<float>(1.0 / 255);

// level * factor + (grey * of_pixel + of_image): a blend with black, the mean grey of the image, or the pixel's grey.
struct Change {
  float factor, of_pixel, of_image;
};

struct Row {
  float *__restrict red, *__restrict green, *__restrict blue;
};

// Whole levels from 0 to 255.
inline int32_t cut(float level) {
  level = level > 0.0f ? level : 0.0f;
  return static_cast<int32_t>(level < 255.0f ? level : 255.0f);
}

inline int32_t grey_of(float red, float green, float blue) {
  return static_cast<int32_t>(red * kRed + green * kGreen + blue * kBlue);
}

void apply(const Change& change, const Row& row, int64_t width) {
  const Change c = change;
  for (int64_t x = 0; x < width; ++x) {
    const float red = row.red[x], green = row.green[x], blue = row.blue[x];
    const float other = static_cast<float>(grey_of(red, green, blue)) * c.of_pixel + c.of_image;
    row.red[x] = static_cast<float>(cut(red * c.factor + other));
    row.green[x] = static_cast<float>(cut(green * c.factor + other));
    row.blue[x] = static_cast<float>(cut(blue * c.factor + other));
  }
}

int64_t sum_grey(const Row& row, int64_t width) {
  // A row of 2^23 white pixels fits.
  int32_t sum = 0;
  for (int64_t x = 0; x < width; ++x) sum += grey_of(row.red[x], row.green[x], row.blue[x]);
  return sum;
}

void normalize(float* row, int64_t width, float mean, float std) {
  for (int64_t x = 0; x < width; ++x) row[x] = (row[x] * kScale - mean) / std;
}

// A row of the flipped, padded and cropped image; `shift` is what the crop is to the right of the unpadded image.
void move_row(const uint8_t* __restrict in, bool flip, int64_t shift, int64_t width, float* __restrict out) {
  const int64_t begin = std::clamp<int64_t>(-shift, 0, width), end = std::clamp<int64_t>(width - shift, begin, width);
  std::fill(out, out + begin, 0.0f);
  std::fill(out + end, out + width, 0.0f);
  if (flip) {
    const uint8_t* last = in + width - 1 - shift;
    for (int64_t x = begin; x < end; ++x) out[x] = static_cast<float>(last[-x]);
  } else {
    for (int64_t x = begin; x < end; ++x) out[x] = static_cast<float>(in[x + shift]);
  }
}

}  // namespace

void augment_images(const Images& images, const ImageDraws& draws, int64_t first, int64_t last) {
  const int64_t height = images.height, width = images.width, plane = height * width;
  for (int64_t i = first; i < last; ++i) {
    const uint8_t* in = images.levels + i * 3 * plane;
    float* out = images.out + i * 3 * plane;
    Change changes[kChanges];
    int64_t contrast = 0;
    for (int64_t place = 0; place < kChanges; ++place) {
      const int64_t kind = draws.order[i * kChanges + place];
      const float factor = draws.factors[i * kChanges + kind];
      changes[place] = {factor, kind == kSaturation ? 1.0f - factor : 0.0f, 0.0f};
      if (kind == kContrast) contrast = place;
    }
    const int64_t down = draws.top[i] - draws.border, right = draws.left[i] - draws.border;
    const auto row_at = [=](int64_t y) {
      float* row = out + y * width;
      return Row{row, row + plane, row + 2 * plane};
    };

    int64_t grey = 0;
    for (int64_t y = 0; y < height; ++y) {
      const Row row = row_at(y);
      const int64_t source = y + down;
      float* const channels[] = {row.red, row.green, row.blue};
      for (int64_t channel = 0; channel < 3; ++channel) {
        if (source < 0 || source >= height) {
          std::fill(channels[channel], channels[channel] + width, 0.0f);
        } else {
          move_row(in + channel * plane + source * width, draws.flip[i] != 0, right, width, channels[channel]);
        }
      }
      for (int64_t place = 0; place < contrast; ++place) apply(changes[place], row, width);
      grey += sum_grey(row, width);
    }

    const float mean = static_cast<float>(static_cast<double>(grey) / static_cast<double>(plane));
    changes[contrast].of_image = (1.0f - changes[contrast].factor) * mean;
    for (int64_t y = 0; y < height; ++y) {
      const Row row = row_at(y);
      for (int64_t place = contrast; place < kChanges; ++place) apply(changes[place], row, width);
      float* const channels[] = {row.red, row.green, row.blue};
      for (int64_t channel = 0; channel < 3; ++channel) {
        normalize(channels[channel], width, images.mean[channel], images.std[channel]);
      }
    }
  }
}

void normalize_images(const Images& images, int64_t first, int64_t last) {
  const int64_t plane = images.height * images.width;
  for (int64_t i = 3 * first; i < 3 * last; ++i) {
    const float mean = images.mean[i % 3], std = images.std[i % 3];
    const uint8_t* __restrict in = images.levels + i * plane;
    float* __restrict out = images.out + i * plane;
    for (int64_t p = 0; p < plane; ++p) out[p] = (static_cast<float>(in[p]) * kScale - mean) / std;
  }
}

}  // namespace dan_fast::DAN_FAST_ISA
