// int8 multiply-adds by VPDPBUSD, as peak_loops.h wants them. No standard library code is used (see simd.h).
#include <immintrin.h>

#include "peak_loops.h"

namespace headrace {
namespace {

constexpr int kChains = 24;

double run(int64_t rounds) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
  __m512i chains[kChains];
  for (__m512i& chain : chains) chain = _mm512_setzero_si512();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chains[c] = _mm512_dpbusd_epi32(chains[c], a, b);
  }
  __m512i total = _mm512_setzero_si512();
  for (const __m512i& chain : chains) total = _mm512_add_epi32(total, chain);
  return _mm512_reduce_add_epi32(total);
}

}  // namespace

PeakLoop peak_int8_avx512_vnni() { return {run, 2.0 * 64 * kChains}; }

}  // namespace headrace
