// Sixteen float lanes on whatever the including file is compiled for: AVX-512, AVX2 (two halves) or plain loops.
// Everything sits in an unnamed namespace: files compiled for different instruction sets must not share inline code.
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
inline Vec load_first(const float* p, int n) {
  float lanes[16] = {};
  std::memcpy(lanes, p, n * sizeof(float));
  return load(lanes);
}
inline void store_first(float* p, Vec x, int n) {
  float lanes[16];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(float));
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
inline void load_u4x2(const uint8_t* p, Vec& low, Vec& high) {
  const __m256i mask = _mm256_set1_epi32(15);
  const __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)));
  low = {_mm256_cvtepi32_ps(_mm256_and_si256(a, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(b, mask))};
  high = {_mm256_cvtepi32_ps(_mm256_srli_epi32(a, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(b, 4))};
}

#else

struct Vec {
  float v[16];
};

template <typename Lane>
inline Vec each_lane(Lane lane) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.v[i] = lane(i);
  return r;
}

inline Vec zero() { return {}; }
inline Vec broadcast(float x) {
  return each_lane([=](int) { return x; });
}
inline Vec load(const float* p) {
  return each_lane([=](int i) { return p[i]; });
}
inline void store(float* p, const Vec& a) { std::memcpy(p, a.v, sizeof a.v); }
inline Vec load_first(const float* p, int n) {
  Vec r{};
  std::memcpy(r.v, p, n * sizeof(float));
  return r;
}
inline void store_first(float* p, const Vec& a, int n) { std::memcpy(p, a.v, n * sizeof(float)); }
inline Vec add(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return each_lane([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec load_f16(const uint16_t* p) {
  return each_lane([=](int i) { return f16_to_f32(p[i]); });
}
inline Vec load_bf16(const uint16_t* p) {
  return each_lane([=](int i) { return bf16_to_f32(p[i]); });
}
inline Vec load_i8(const int8_t* p) {
  return each_lane([=](int i) { return static_cast<float>(p[i]); });
}
inline void load_u4x2(const uint8_t* p, Vec& low, Vec& high) {
  low = each_lane([=](int i) { return static_cast<float>(p[i] & 15); });
  high = each_lane([=](int i) { return static_cast<float>(p[i] >> 4); });
}

#endif

}  // namespace
}  // namespace headrace
