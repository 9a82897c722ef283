// f32 multiply-adds and reads, as peak_loops.h wants them. Compiled once per instruction set.
#include <cstring>

#include "peak_loops.h"
#include "simd.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

#if defined(__AVX512BW__)
constexpr int kChains = 24;  // of 32 registers
constexpr int kWords = 8;    // 64-bit words of a register
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int kChains = 6;  // of two registers each, of 16
constexpr int kWords = 4;
#else
constexpr int kChains = 3;  // of four registers each
constexpr int kWords = 2;
#endif

double run(int64_t rounds) {
  // 1 * 0.5 + 0.5 stays 1: neither infinities nor denormal numbers. Volatile, or the compiler would see that, too.
  volatile const float hidden = 0.5f;
  const Vec half = broadcast(hidden);
  Vec chains[kChains];
  for (Vec& chain : chains) chain = broadcast(1.0f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chains[c] = fma(chains[c], half, half);
  }
  float lanes[16], total = 0;
  for (const Vec& chain : chains) {
    store(lanes, chain);
    for (float lane : lanes) total += lane;
  }
  return total;
}

using Words [[gnu::vector_size(8 * kWords)]] = uint64_t;
constexpr int kStreams = 8, kLine = 8;  // words of a cache line
constexpr int kAhead = 96;              // words from a line that is read to the one that is asked for

template <bool Ahead>
uint64_t read(const uint64_t* x, int64_t n) {
  const int64_t stream = n / kStreams;
  Words sums[kStreams] = {};
  for (int64_t i = 0; i < stream; i += kLine) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const uint64_t* line = x + s * stream + i;
      if (Ahead) __builtin_prefetch(line + kAhead);
#pragma GCC unroll 4
      for (int w = 0; w < kLine; w += kWords) {
        Words words;
        std::memcpy(&words, line + w, sizeof words);
        sums[s] += words;
      }
    }
  }
  uint64_t total = 0;
  for (const Words& sum : sums) {
    for (int w = 0; w < kWords; ++w) total += sum[w];
  }
  return total;
}

}  // namespace

uint64_t read_words(const uint64_t* x, int64_t n) { return read<false>(x, n); }
uint64_t read_words_ahead(const uint64_t* x, int64_t n) { return read<true>(x, n); }

PeakLoop peak_f32() { return {run, 2.0 * 16 * kChains}; }

}  // namespace headrace::HEADRACE_KERNELS
