// bf16 multiply-adds by VDPBF16PS, as peak_loops.h wants them. No standard library code is used (see simd.h).
#include <immintrin.h>

#include "peak_loops.h"

namespace headrace {
namespace {

constexpr int kChains = 24;

double run(int64_t rounds) {
  const __m512bh tiny = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0x1p-20f), _mm512_set1_ps(0x1p-20f));
  __m512 chains[kChains];
  for (__m512& chain : chains) chain = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chains[c] = _mm512_dpbf16_ps(chains[c], tiny, tiny);
  }
  __m512 total = _mm512_setzero_ps();
  for (const __m512& chain : chains) total = _mm512_add_ps(total, chain);
  return _mm512_reduce_add_ps(total);
}

}  // namespace

PeakLoop peak_bf16_avx512_bf16() { return {run, 2.0 * 32 * kChains}; }

}  // namespace headrace
