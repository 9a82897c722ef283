// Sixteen float lanes on whatever the including file is compiled for: AVX-512, AVX2 (two halves) or anything else (four
// quarters). Everything sits in an unnamed namespace: files compiled for different instruction sets must not share
// inline code.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#endif

#include "formats.h"

namespace headrace {
namespace {

#if defined(__AVX512BW__)

struct Vec {
  __m512 v;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps((1u << n) - 1, p)}; }
inline void store_first(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, a.v); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Vec load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline Vec load_e4m3(const uint8_t* p) {  // 480 where it should be NaN
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m512i magnitude = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x7f)), 20);
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x80)), 24);
  return {_mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(magnitude, sign)), _mm512_set1_ps(0x1p120f))};
}
inline void load_u4x2(const uint8_t* p, Vec& low, Vec& high) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  low.v = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
  high.v = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Vec {
  __m256 a, b;
};

inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Vec add(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Vec fma(Vec x, Vec y, Vec z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Vec load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256 shift_to_f32(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Vec load_bf16(const uint16_t* p) { return {shift_to_f32(p), shift_to_f32(p + 8)}; }
inline Vec load_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
inline Vec load_e4m3(const uint8_t* p) {
  const auto half = [](const uint8_t* q) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)q));
    const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0x7f)), 20);
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0x80)), 24);
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(magnitude, sign)), _mm256_set1_ps(0x1p120f));
  };
  return {half(p), half(p + 8)};
}
inline void load_u4x2(const uint8_t* p, Vec& low, Vec& high) {
  const __m256i mask = _mm256_set1_epi32(15);
  const __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)));
  low = {_mm256_cvtepi32_ps(_mm256_and_si256(a, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(b, mask))};
  high = {_mm256_cvtepi32_ps(_mm256_srli_epi32(a, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(b, 4))};
}

#else

// Four quarters of four lanes, in the generic vectors of GCC and Clang: one SSE2 or NEON register each. Not one vector
// of sixteen, which compilers keep in memory where registers are shorter.
template <typename T>
using Quarter [[gnu::vector_size(4 * sizeof(T))]] = T;
using F32x4 = Quarter<float>;

struct Vec {
  F32x4 a, b, c, d;  // named, because compilers keep arrays of accumulators in memory
};

template <typename Make>
inline Vec each_quarter(Make make) {
  return {make(0), make(1), make(2), make(3)};
}

template <typename T>
inline Quarter<T> load_quarter(const T* p) {
  Quarter<T> q;
  std::memcpy(&q, p, sizeof q);
  return q;
}

inline Vec broadcast(float x) {
  return each_quarter([=](int) { return F32x4{x, x, x, x}; });
}
inline Vec zero() { return broadcast(0); }
inline Vec load(const float* p) {
  return each_quarter([=](int i) { return load_quarter(p + 4 * i); });
}
inline void store(float* p, Vec x) {
  std::memcpy(p, &x.a, sizeof x.a);
  std::memcpy(p + 4, &x.b, sizeof x.b);
  std::memcpy(p + 8, &x.c, sizeof x.c);
  std::memcpy(p + 12, &x.d, sizeof x.d);
}
inline Vec add(Vec x, Vec y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
inline Vec fma(Vec x, Vec y, Vec z) { return {x.a * y.a + z.a, x.b * y.b + z.b, x.c * y.c + z.c, x.d * y.d + z.d}; }
inline Vec load_f16(const uint16_t* p) {
  return each_quarter([=](int i) {
    const uint16_t* q = p + 4 * i;
    return F32x4{f16_to_f32(q[0]), f16_to_f32(q[1]), f16_to_f32(q[2]), f16_to_f32(q[3])};
  });
}
inline Vec load_bf16(const uint16_t* p) {
  return each_quarter(
      [=](int i) { return (F32x4)(__builtin_convertvector(load_quarter(p + 4 * i), Quarter<uint32_t>) << 16); });
}
inline Vec load_i8(const int8_t* p) {
  return each_quarter([=](int i) {
    return __builtin_convertvector(__builtin_convertvector(load_quarter(p + 4 * i), Quarter<int32_t>), F32x4);
  });
}
inline Vec load_e4m3(const uint8_t* p) {
  return each_quarter([=](int i) {
    const auto wide = __builtin_convertvector(load_quarter(p + 4 * i), Quarter<uint32_t>);
    return (F32x4)((wide & 0x7f) << 20 | (wide & 0x80) << 24) * 0x1p120f;
  });
}
inline void load_u4x2(const uint8_t* p, Vec& low, Vec& high) {
  const auto wide = [=](int i) { return __builtin_convertvector(load_quarter(p + 4 * i), Quarter<int32_t>); };
  low = each_quarter([=](int i) { return __builtin_convertvector(wide(i) & 15, F32x4); });
  high = each_quarter([=](int i) { return __builtin_convertvector(wide(i) >> 4, F32x4); });
}

#endif

#if !defined(__AVX512BW__)
// By way of an array: taking the address of a vector would keep it, and accumulators beside it, in memory.
inline Vec load_first(const float* p, int n) {
  float lanes[16] = {};
  std::memcpy(lanes, p, n * sizeof(float));
  return load(lanes);
}
inline void store_first(float* p, Vec a, int n) {
  float lanes[16];
  store(lanes, a);
  std::memcpy(p, lanes, n * sizeof(float));
}
#endif

}  // namespace
}  // namespace headrace
