// Integer multiply-adds as the AVX2 kernels make them, VPMADDWD and VPMADDUBSW each with an addition, as peak_loops.h
// wants them: six chains in assembly, for the reason in peak_twelve.h. No standard library code is used (see simd.h).
#include <immintrin.h>

#include "peak_loops.h"

namespace headrace {
namespace {

#define HEADRACE_CHAIN(multiply, add, sum) multiply " %7, %6, %%ymm15\n\t" add " %%ymm15, %" sum ", %" sum "\n\t"
#define HEADRACE_SIX_CHAINS(name, multiply, add)                                                 \
  double name(int64_t rounds) {                                                                  \
    const __m256i left = _mm256_set1_epi8(3), right = left;                                      \
    __m256i c0 = _mm256_setzero_si256(), c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0;            \
    for (int64_t i = 0; i < rounds; ++i) {                                                       \
      asm volatile(HEADRACE_CHAIN(multiply, add, "0") HEADRACE_CHAIN(multiply, add, "1")         \
                       HEADRACE_CHAIN(multiply, add, "2") HEADRACE_CHAIN(multiply, add, "3")     \
                           HEADRACE_CHAIN(multiply, add, "4") HEADRACE_CHAIN(multiply, add, "5") \
                   : "+x"(c0), "+x"(c1), "+x"(c2), "+x"(c3), "+x"(c4), "+x"(c5)                  \
                   : "x"(left), "x"(right)                                                       \
                   : "xmm15");                                                                   \
    }                                                                                            \
    return _mm256_extract_epi32(c0, 0);                                                          \
  }

HEADRACE_SIX_CHAINS(run_words, "vpmaddwd", "vpaddd")
HEADRACE_SIX_CHAINS(run_bytes, "vpmaddubsw", "vpaddw")

}  // namespace

PeakLoop peak_int16_avx2() { return {run_words, 6 * 2.0 * 16}; }
PeakLoop peak_int8_avx2() { return {run_bytes, 6 * 2.0 * 32}; }

}  // namespace headrace
