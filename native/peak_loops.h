// The loops behind peak.h and bandwidth.h, per instruction set. They return sums, so that no compiler may skip them.
#pragma once

#include <cstdint>

namespace headrace {

// Independent chains of multiply-adds, enough of them to hide one's latency, `rounds` times.
struct PeakLoop {
  double (*run)(int64_t rounds);
  double operations;  // of one round
};

// `read_words` reads `n` 64-bit words (a multiple of kReadWords), in several streams side by side: one alone leaves
// memory idle between the pages that a prefetcher follows. `read_words_ahead` also asks for each line before its turn,
// which is faster beyond the caches and slower within them.
constexpr int64_t kReadWords = 64;

namespace portable {
PeakLoop peak_f32();
uint64_t read_words(const uint64_t* x, int64_t n);
uint64_t read_words_ahead(const uint64_t* x, int64_t n);
}  // namespace portable
namespace avx2 {
PeakLoop peak_f32();
uint64_t read_words(const uint64_t* x, int64_t n);
uint64_t read_words_ahead(const uint64_t* x, int64_t n);
}  // namespace avx2
namespace avx512 {
PeakLoop peak_f32();
uint64_t read_words(const uint64_t* x, int64_t n);
uint64_t read_words_ahead(const uint64_t* x, int64_t n);
}  // namespace avx512
PeakLoop peak_int16_avx2();
PeakLoop peak_int8_avx2();
PeakLoop peak_int8_avx512_vnni();
PeakLoop peak_bf16_avx512_bf16();
PeakLoop peak_bf16_amx();
PeakLoop peak_int8_amx();

}  // namespace headrace
