// Sixteen floats at a time in the compilers' generic vectors (GCC, Clang): one instruction with AVX-512, two with AVX2,
// four with SSE2 or NEON. Included by `*_kernels.cpp` only, which are compiled once per instruction set: everything
// here has internal linkage, so that no instruction set's copy can stand in for another's.
#pragma once

#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace headrace {
namespace {

#define HEADRACE_INLINE inline __attribute__((always_inline, unused))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));

constexpr int64_t kLanes = 16;
constexpr i32x16 kLaneIds = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <typename Vector, typename T>
HEADRACE_INLINE Vector load_as(const T* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

HEADRACE_INLINE f32x16 load(const float* p) { return load_as<f32x16>(p); }

// bf16 is the upper half of an f32. (Of the generic widening GCC makes six instructions where the machine has one.)
HEADRACE_INLINE f32x16 load(const uint16_t* p) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif defined(__AVX2__)
  const __m256i low = _mm256_cvtepu16_epi32(load_as<__m128i>(p)), high = _mm256_cvtepu16_epi32(load_as<__m128i>(p + 8));
  return __builtin_shufflevector((f32x8)_mm256_slli_epi32(low, 16), (f32x8)_mm256_slli_epi32(high, 16), 0, 1, 2, 3, 4,
                                 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return (f32x16)(__builtin_convertvector(load_as<u16x16>(p), u32x16) << 16);
#endif
}

HEADRACE_INLINE f32x16 load(const int8_t* p) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(p)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  const __m256i high = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)));
  return __builtin_shufflevector((f32x8)_mm256_cvtepi32_ps(low), (f32x8)_mm256_cvtepi32_ps(high), 0, 1, 2, 3, 4, 5, 6,
                                 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return __builtin_convertvector(load_as<i8x16>(p), f32x16);
#endif
}

HEADRACE_INLINE void store(float* p, f32x16 v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n < 16 values; zeros after them.
HEADRACE_INLINE f32x16 load_part(const float* p, int64_t n) {
  f32x16 v{};
  __builtin_memcpy(&v, p, n * sizeof(float));
  return v;
}

HEADRACE_INLINE void store_part(float* p, f32x16 v, int64_t n) { __builtin_memcpy(p, &v, n * sizeof(float)); }

// x - 0 is x, bit for bit, which compilers know; 0 + x is not where x is -0.
HEADRACE_INLINE f32x16 broadcast(float x) { return x - f32x16{}; }

// b where either is no number. (Of the generic form GCC makes a comparison and a blend.)
HEADRACE_INLINE f32x16 max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Reduce lanes in one fixed order on every machine: halves onto each other.
template <typename Combine>
HEADRACE_INLINE float reduce(f32x16 v, Combine combine) {
  const f32x8 a = combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                          __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  const f32x4 b = combine(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7));
  const f32x4 c = combine(b, __builtin_shufflevector(b, b, 2, 3, 2, 3));
  return combine(c, __builtin_shufflevector(c, c, 1, 1, 1, 1))[0];
}

HEADRACE_INLINE float sum(f32x16 v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
HEADRACE_INLINE float max(f32x16 v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to 2 ulp. Below -87.3 it is 0 (so e^-inf is); above 88 it stays at e^88. The polynomial is Cephes' expf.
HEADRACE_INLINE f32x16 exp(f32x16 x) {
  constexpr float kLowest = -87.3f, kHighest = 88.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const f32x16 clamped = x > kHighest ? broadcast(kHighest) : (x < kLowest ? broadcast(kLowest) : x);
  const f32x16 rounded = clamped * 1.44269504088896341f + kRound;
  const f32x16 n = rounded - kRound;
  f32x16 r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const i32x16 exponent = ((i32x16)rounded - 0x4B400000 + 127) << 23;
  const f32x16 y = p * (f32x16)exponent;
  return x < kLowest ? f32x16{} : y;
}

// 2^x to 2 ulp, for x <= 0; exactly 1 at 0. Below -127 it is 0 (so 2^-inf is); a NaN stays one. The polynomial is the
// best of its degree for 2^r, |r| <= 1/2.
HEADRACE_INLINE f32x16 exp2(f32x16 x) {
  constexpr float kRound = 12582912.0f + 127.0f;  // see exp; with the exponent's bias
  const f32x16 clamped = max(broadcast(-127.0f), x);
  const f32x16 rounded = clamped + kRound;
  const f32x16 r = clamped - (rounded - kRound);
  f32x16 p = r * 1.3264727e-3f + 9.671513e-3f;
  p = p * r + 5.5507336e-2f;
  p = p * r + 0.24022242f;
  p = p * r + 0.693147f;
  p = p * r + 1.0f;
  return p * (f32x16)((i32x16)rounded << 23);
}

// e^x to about 1 ulp, for x <= 0. Below -708 it is 0. Taylor's series to r^13, |r| <= ln(2) / 2.
HEADRACE_INLINE f64x8 exp(f64x8 x) {
  constexpr double kLowest = -708.0;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  constexpr double kSeries[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  const f64x8 clamped = x < kLowest ? f64x8{} + kLowest : x;
  const f64x8 rounded = clamped * 1.4426950408889634074 + kRound;
  const f64x8 n = rounded - kRound;
  f64x8 r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  f64x8 p = f64x8{} + kSeries[13];
#pragma GCC unroll 16
  for (int i = 12; i >= 0; --i) p = p * r + kSeries[i];
  const i64x8 exponent = ((i64x8)rounded - 0x4338000000000000 + 1023) << 52;
  return x < kLowest ? f64x8{} : p * (f64x8)exponent;
}

// To bf16, to nearest, ties to even; a NaN stays one.
HEADRACE_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace
}  // namespace headrace
