// Vectors as wide as the instruction set has them, how half precision goes in and out, sums in a fixed order, and
// memory for temporaries. For `*_isa.cpp` files only: everything has internal linkage, so that no instruction set gets
// another's code.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "../common/math.h"
#include "../common/scalar.h"
#include "isa.h"

#if defined(__AVX2__)
// GCC 12 sees an uninitialised operand in intrinsics that have none.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dan_fast::DAN_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <typename T, int Bytes = kVectorBytes>
struct VectorType {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <typename T, int Bytes = kVectorBytes>
using Vector = typename VectorType<T, Bytes>::type;

// Numbers in a vector.
template <typename T>
constexpr int64_t kWidth = kVectorBytes / static_cast<int>(sizeof(T));

// Partial sums of one total: 64 bytes of them, in as many vectors as that takes, so that sums have the same order, and
// the same bits, on every instruction set.
template <typename T>
constexpr int64_t kLanes = 64 / static_cast<int64_t>(sizeof(T));
template <typename T>
constexpr int kParts = static_cast<int>(kLanes<T> / kWidth<T>);

// The total of kCount partial sums, the second half added to the first until one number is left. Overwrites them.
template <int64_t kCount, typename T>
inline T add_halves(T* lanes) {
  for (int64_t half = kCount / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <typename V, typename T>
inline V load_bits(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename T>
inline Vector<T> load(const T* from) {
  return load_bits<Vector<T>>(from);
}

template <typename T>
inline void store(T* to, Vector<T> vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// x - 0 is x for every x, the negative zero included; compilers make it a broadcast.
template <typename T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// a * b + c, rounded once where the instruction set can do that.
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

using Floats = Vector<float>;
using Words = Vector<uint32_t>;
using Shorts = Vector<uint16_t, kVectorBytes / 2>;

inline Words select(Vector<int32_t> mask, Words yes, Words no) {
  const Words bits = reinterpret_cast<Words>(mask);
  return (yes & bits) | (no & ~bits);
}

inline Words widen(Shorts halves) {
#if defined(__AVX512F__)  // compilers make two vectors of half the width of the conversion
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}

inline Floats from_storage(BFloat16, Shorts halves) { return reinterpret_cast<Floats>(widen(halves) << 16); }

inline Shorts to_storage(BFloat16, Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(select((bits & 0x7fffffffu) > 0x7f800000u, quiet, rounded), Shorts);
}

#if defined(__AVX512F__)
inline Floats from_storage(Float16, Shorts halves) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(halves)); }
inline Shorts to_storage(Float16, Floats values) {
  return reinterpret_cast<Shorts>(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
inline Floats from_storage(Float16, Shorts halves) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(halves)); }
inline Shorts to_storage(Float16, Floats values) {
  return reinterpret_cast<Shorts>(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// Maratyszcza's FP16: a change of exponent by a multiplication, subnormal numbers by a subtraction.
inline Floats from_storage(Float16, Shorts halves) {
  const Words word = __builtin_convertvector(halves, Words) << 16;
  const Words twice = word + word;
  const Floats normal = reinterpret_cast<Floats>((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const Floats subnormal = reinterpret_cast<Floats>((twice >> 17) | (126u << 23)) - 0.5f;
  const Words bits =
      select(twice < (1u << 27), reinterpret_cast<Words>(subnormal), reinterpret_cast<Words>(normal));
  return reinterpret_cast<Floats>(bits | (word & 0x80000000u));
}

inline Shorts to_storage(Float16, Floats values) {
  const Words word = reinterpret_cast<Words>(values), twice = word + word;
  const Floats magnitude = reinterpret_cast<Floats>(word & 0x7fffffffu) * 0x1p+112f * 0x1p-110f;
  const Words exponent = twice & 0xFF000000u;
  const Words bias = select(exponent < 0x71000000u, Words{} + 0x71000000u, exponent);
  const Floats shifted = reinterpret_cast<Floats>((bias >> 1) + 0x07800000u) + magnitude;
  const Words bits = reinterpret_cast<Words>(shifted);
  const Words rounded = ((bits >> 13) & 0x7c00u) + (bits & 0xfffu);
  const Words half = select(twice > 0xFF000000u, Words{} + 0x7E00u, rounded);
  return __builtin_convertvector(half | ((word & 0x80000000u) >> 16), Shorts);
}
#endif

// One vector of a row in the type of statistics.
template <typename A, typename S>
inline Vector<A> load_as(const S* from) {
  if constexpr (std::is_same_v<S, A>) {
    return load(from);
  } else {
    return from_storage(S{}, load_bits<Shorts>(from));
  }
}

// Rounds to storage, stores, and gives what was stored.
template <typename S, typename A>
inline Vector<A> store_as(S* to, Vector<A> values) {
  if constexpr (std::is_same_v<S, A>) {
    store(to, values);
    return values;
  } else {
    const Shorts halves = to_storage(S{}, values);
    std::memcpy(to, &halves, sizeof halves);
    return from_storage(S{}, halves);
  }
}

// `count` < kWidth numbers and zeros.
template <typename A, typename S>
inline Vector<A> load_some_as(const S* from, int64_t count) {
  S buffer[kWidth<A>] = {};
  std::memcpy(buffer, from, static_cast<size_t>(count) * sizeof(S));
  return load_as<A>(buffer);
}

template <typename S, typename A>
inline Vector<A> store_some_as(S* to, Vector<A> values, int64_t count) {
  S buffer[kWidth<A>];
  const Vector<A> stored = store_as<S, A>(buffer, values);
  std::memcpy(to, buffer, static_cast<size_t>(count) * sizeof(S));
  return stored;
}

template <typename A, typename S>
inline A load_one(const S* from) {
  return load_some_as<A>(from, 1)[0];
}

template <typename A, typename S>
inline Vector<A> load_up_to(const S* from, int64_t count) {
  return count >= kWidth<A> ? load_as<A>(from) : load_some_as<A>(from, count);
}

template <typename A, typename S>
inline void store_up_to(S* to, Vector<A> values, int64_t count) {
  count >= kWidth<A> ? store_as<S, A>(to, values) : store_some_as<S, A>(to, values, count);
}

// `count` numbers in the type of statistics.
template <typename S, typename A>
inline void widen(const S* from, int64_t count, A* to) {
  int64_t c = 0;
  for (; c + kWidth<A> <= count; c += kWidth<A>) store(to + c, load_as<A>(from + c));
  if (c == count) return;
  const Vector<A> rest = load_some_as<A>(from + c, count - c);
  std::memcpy(to + c, &rest, static_cast<size_t>(count - c) * sizeof(A));
}

// Uninitialised memory. Not std::vector, whose code the linker shares among instruction sets.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(bytes(size), kAlign))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, kAlign); }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  static size_t bytes(int64_t size) { return static_cast<size_t>(size < 1 ? 1 : size) * sizeof(T); }
  T* const data_;
};

}  // namespace
}  // namespace dan_fast::DAN_FAST_ISA
