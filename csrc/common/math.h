// Arithmetic that kernels of several rooms share; the same on the CPU and in CUDA, in all instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DAN_FAST_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always, or a file compiled for one instruction set would link the copy of another.
#define DAN_FAST_HD inline __attribute__((always_inline))
#else
#define DAN_FAST_HD inline
#endif

namespace dan_fast {

DAN_FAST_HD constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// 1.5 2^23 and 1.5 2^52: the numbers about it are whole, so adding it rounds.
template <typename T>
constexpr T kWhole = sizeof(T) == sizeof(float) ? T(12582912.0) : T(6755399441055744.0);

// exp(x) for x in [-1, 1] by its Taylor series, within 3 units of the last place: needs no maximum subtracted
// first, no table and no branch, and is the same on every device.
DAN_FAST_HD float exp_of_cosine(float x) {
  float y = 1.0f / 479001600.0f;
  y = y * x + 1.0f / 39916800.0f;
  y = y * x + 1.0f / 3628800.0f;
  y = y * x + 1.0f / 362880.0f;
  y = y * x + 1.0f / 40320.0f;
  y = y * x + 1.0f / 5040.0f;
  y = y * x + 1.0f / 720.0f;
  y = y * x + 1.0f / 120.0f;
  y = y * x + 1.0f / 24.0f;
  y = y * x + 1.0f / 6.0f;
  y = y * x + 0.5f;
  y = y * x + 1.0f;
  return y * x + 1.0f;
}

DAN_FAST_HD double exp_of_cosine(double x) {
  double y = 1.0 / 2432902008176640000.0;
  y = y * x + 1.0 / 121645100408832000.0;
  y = y * x + 1.0 / 6402373705728000.0;
  y = y * x + 1.0 / 355687428096000.0;
  y = y * x + 1.0 / 20922789888000.0;
  y = y * x + 1.0 / 1307674368000.0;
  y = y * x + 1.0 / 87178291200.0;
  y = y * x + 1.0 / 6227020800.0;
  y = y * x + 1.0 / 479001600.0;
  y = y * x + 1.0 / 39916800.0;
  y = y * x + 1.0 / 3628800.0;
  y = y * x + 1.0 / 362880.0;
  y = y * x + 1.0 / 40320.0;
  y = y * x + 1.0 / 5040.0;
  y = y * x + 1.0 / 720.0;
  y = y * x + 1.0 / 120.0;
  y = y * x + 1.0 / 24.0;
  y = y * x + 1.0 / 6.0;
  y = y * x + 0.5;
  y = y * x + 1.0;
  return y * x + 1.0;
}

// exp(x) within 2 units of the last place for x in [-87, 88], in double [-708, 709]. What lies below counts as the
// lower end, what lies above gives infinity, NaN stays. Without a branch or a call, so that loops over it become
// vectors.
DAN_FAST_HD float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + kWhole<float>, whole = shifted - kWhole<float>;
  const float rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;  // Cody and Waite's two parts of log 2
  float y = 1.0f / 5040.0f;
  y = y * rest + 1.0f / 720.0f;
  y = y * rest + 1.0f / 120.0f;
  y = y * rest + 1.0f / 24.0f;
  y = y * rest + 1.0f / 6.0f;
  y = y * rest + 0.5f;
  y = y * rest + 1.0f;
  y = y * rest + 1.0f;
  const float base = kWhole<float>;
  uint32_t bits, base_bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&base_bits, &base, sizeof bits);
  bits = (bits - base_bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

DAN_FAST_HD double exp_of(double x) {
  x = x < -708.0 ? -708.0 : x;
  x = x > 710.0 ? 710.0 : x;
  const double shifted = x * 1.4426950408889634 + kWhole<double>, whole = shifted - kWhole<double>;
  const double rest = (x - whole * 6.93147180369123816490e-01) - whole * 1.90821492927058770002e-10;
  double y = 1.0 / 6227020800.0;
  y = y * rest + 1.0 / 479001600.0;
  y = y * rest + 1.0 / 39916800.0;
  y = y * rest + 1.0 / 3628800.0;
  y = y * rest + 1.0 / 362880.0;
  y = y * rest + 1.0 / 40320.0;
  y = y * rest + 1.0 / 5040.0;
  y = y * rest + 1.0 / 720.0;
  y = y * rest + 1.0 / 120.0;
  y = y * rest + 1.0 / 24.0;
  y = y * rest + 1.0 / 6.0;
  y = y * rest + 0.5;
  y = y * rest + 1.0;
  y = y * rest + 1.0;
  const double base = kWhole<double>;
  uint64_t bits, base_bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&base_bits, &base, sizeof bits);
  bits = (bits - base_bits + 1023u) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

template <typename T>
DAN_FAST_HD T sigmoid(T x) {
  return T(1) / (T(1) + exp_of(-x));
}

// Its derivative, from its value.
template <typename T>
DAN_FAST_HD T sigmoid_backward(T gate) {
  return gate * (T(1) - gate);
}

}  // namespace dan_fast
