// bf16 and int8 multiply-adds by AMX tile products, as peak_loops.h wants them. No standard library code is used (see
// simd.h).
#include <immintrin.h>

#include "peak_loops.h"
#include "tiles_amx.h"

namespace headrace {
namespace {

;

// Eight whole tiles of 16 rows of 64 bytes: 0 to 3 accumulate, 4 and 5 are left operands, 6 and 7 right ones. Four
// products of 16 cycles each hide the 52 that one takes.
void configure() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
  config.load();
}

// Operands of one bit pattern: `pair` is two bf16 values or four bytes.
void load_operands(uint32_t pair) {
  alignas(64) uint32_t tile[256];
  for (uint32_t& each : tile) each = pair;
  asm volatile("" ::"r"(tile) : "memory");  // GCC's tile loads do not tell the compiler what memory they read
  _tile_loadd(4, tile, 64);
  _tile_loadd(5, tile, 64);
  _tile_loadd(6, tile, 64);
  _tile_loadd(7, tile, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

double run_bf16(int64_t rounds) {
  configure();
  load_operands(0x3f803f80);  // ones
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[256] = {};
  _tile_stored(0, sums, 64);
  asm volatile("" ::"r"(sums) : "memory");
  _tile_release();
  return sums[0];
}

double run_int8(int64_t rounds) {
  configure();
  load_operands(0x03030303);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  alignas(64) int32_t sums[256] = {};
  _tile_stored(0, sums, 64);
  asm volatile("" ::"r"(sums) : "memory");
  _tile_release();
  return sums[0];
}

}  // namespace

PeakLoop peak_bf16_amx() { return {run_bf16, 4 * 2.0 * 16 * 16 * 32}; }
PeakLoop peak_int8_amx() { return {run_int8, 4 * 2.0 * 16 * 16 * 64}; }

}  // namespace headrace
