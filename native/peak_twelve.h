// Twelve independent chains of one three-operand AVX-512 instruction, written in assembly: from the intrinsics GCC 12
// makes a product and up to four moves, some of them to memory. No standard library code is used (see simd.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#define HEADRACE_TWELVE(op)                                                                      \
  op " %13, %12, %0\n\t" op " %13, %12, %1\n\t" op " %13, %12, %2\n\t" op " %13, %12, %3\n\t" op \
     " %13, %12, %4\n\t" op " %13, %12, %5\n\t" op " %13, %12, %6\n\t" op " %13, %12, %7\n\t" op \
     " %13, %12, %8\n\t" op " %13, %12, %9\n\t" op " %13, %12, %10\n\t" op " %13, %12, %11"

// A function that runs the chains `rounds` times from zero on operands whose every dword is `a` and `b`.
#define HEADRACE_TWELVE_CHAINS(name, op)                                                                         \
  double name(int64_t rounds, uint32_t a, uint32_t b) {                                                          \
    const __m512i left = _mm512_set1_epi32(static_cast<int>(a)), right = _mm512_set1_epi32(static_cast<int>(b)); \
    __m512i c0 = _mm512_setzero_si512(), c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0;                            \
    __m512i c6 = c0, c7 = c0, c8 = c0, c9 = c0, c10 = c0, c11 = c0;                                              \
    for (int64_t i = 0; i < rounds; ++i) {                                                                       \
      asm volatile(HEADRACE_TWELVE(op)                                                                           \
                   : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7), "+v"(c8),   \
                     "+v"(c9), "+v"(c10), "+v"(c11)                                                              \
                   : "v"(left), "v"(right));                                                                     \
    }                                                                                                            \
    return _mm512_reduce_add_epi32(c0);                                                                          \
  }
