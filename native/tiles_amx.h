// Tile registers by number. GCC's intrinsics take literals only, do not tell the compiler what memory they read, and
// drop stores to the configuration. Internal linkage, see simd.h.
#pragma once

#include <cstdint>

namespace headrace {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t num_rows, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};

inline void release_tiles() { asm volatile("tilerelease" ::); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C [m][n] += sum of A [m][4 k + i] * B [k][4 n + i], bytes to 32 bits: signed by signed.
template <int C, int A, int B>
inline void tile_multiply_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// Signed A by unsigned B.
template <int C, int A, int B>
inline void tile_multiply_unsigned() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// C [m][n] += A [m][2 k + i] * B [k][2 n + i], bf16 to f32: two chains of fused multiply-adds, over i, added up.
template <int C, int A, int B>
inline void tile_multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace headrace
