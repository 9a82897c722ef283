// The AMX kernels. Everything but the entry point has internal linkage and no standard library code is used (see
// simd.h).
//
// One output is computed as, in this order for every shape of the call:
//   for each block of tile_k features:   C = tile(hi); C += tile(lo); acc = fma(C, scale, acc);
//                                        acc = fma(offset, sum of inputs, acc)
// where a tile product is two chains of fused multiply-adds over even and odd k, added at its end (the definition of
// TDPBF16PS). Up to 8 rows, hi and lo rows are stacked in one A tile and C is added up in the epilogue: that is the
// same addition, so the bits are the same, at half the tile products. A product with few rows costs 12 cycles instead
// of 19, and storing C costs 18 whatever its rows.
#include <immintrin.h>

#include "linear_tile.h"
#include "tiles_amx.h"

namespace headrace {
namespace {

using Payload = AmxWeights::Payload;

constexpr int64_t kTileBytes = 1024;
// Many rows: a chunk of features of a group of panels is unpacked at a time, 32 KiB.
constexpr int64_t kChunkBlocks = 8, kGroupPanels = 4;

// Tile registers, two of each: while one block is multiplied, the next one loads and the last one is stored.
constexpr int kC = 0, kB = 2, kHi = 4, kLo = 6;

// GCC's tile loads do not tell the compiler what memory they read.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

void configure(int64_t a_rows, int64_t tile_k) {
  TileConfig config;
  for (int i = 0; i < 2; ++i) {
    config.set(kC + i, a_rows, 64);
    config.set(kB + i, tile_k / 2, 64);
    config.set(kHi + i, a_rows, tile_k * 2);
    config.set(kLo + i, a_rows, tile_k * 2);
  }
  config.load();
}

// ---- unpacking a block to a B tile ----------------------------------------------------------------------------------

// bf16 values of the 4-bit codes, twice: vpermw indexes 32 entries, and the fifth bit of an index is whatever the
// neighbouring nibble left there.
__m512i code_table(int min_q) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) {
    const float value = static_cast<float>((i & 15) + min_q);
    table[i] = static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(value))) >> 16);
  }
  return _mm512_load_si512(table);
}

template <int TileK>
inline void unpack_u4(const uint8_t* from, __m512i table, uint8_t* to) {
  for (int r = 0; r < TileK / 8; ++r) {
    const __m512i w = _mm512_loadu_si512(from + 64 * r);
    uint8_t* out = to + 256 * r;
    _mm512_store_si512(out, _mm512_permutexvar_epi16(w, table));
    _mm512_store_si512(out + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), table));
    _mm512_store_si512(out + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), table));
    _mm512_store_si512(out + 192, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), table));
  }
}

// Two bytes q + 128 in the low half of each lane become a bf16 pair. A byte dropped into the mantissa of a power of two
// whose unit sits where the byte does is that power plus the byte; subtracting is exact, and so is cutting to bf16.
inline __m512i pair_from_bytes(__m512i w) {
  const __m512i magic0 = _mm512_set1_epi32(0x4b000000), magic1 = _mm512_set1_epi32(0x47000000);  // 2^23, 2^15
  const __m512i even = _mm512_ternarylogic_epi32(w, _mm512_set1_epi32(0xff), magic0, 0xea);      // (w & mask) | magic
  const __m512i odd = _mm512_ternarylogic_epi32(w, _mm512_set1_epi32(0xff00), magic1, 0xea);
  const __m512 q0 = _mm512_sub_ps(_mm512_castsi512_ps(even), _mm512_set1_ps(0x1p23f + 128));
  const __m512 q1 = _mm512_sub_ps(_mm512_castsi512_ps(odd), _mm512_set1_ps(0x1p15f + 128));
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(q0), 16);
  return _mm512_ternarylogic_epi32(_mm512_castps_si512(q1), _mm512_set1_epi32(-65536), low, 0xea);
}

template <int TileK>
inline void unpack_i8(const uint8_t* from, uint8_t* to) {
  for (int r = 0; r < TileK / 4; ++r) {
    const __m512i w = _mm512_loadu_si512(from + 64 * r);
    _mm512_store_si512(to + 128 * r, pair_from_bytes(w));
    _mm512_store_si512(to + 128 * r + 64, pair_from_bytes(_mm512_srli_epi32(w, 16)));
  }
}

template <Payload P, int TileK>
inline void unpack(const uint8_t* from, __m512i table, uint8_t* to) {
  if constexpr (P == Payload::u4) unpack_u4<TileK>(from, table, to);
  if constexpr (P == Payload::i8) unpack_i8<TileK>(from, to);
}

// ---- one panel times one row tile
// ------------------------------------------------------------------------------------

template <bool F16>
inline __m512 load_scales(const uint8_t* p) {
  if constexpr (F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_loadu_ps(p);
}

struct PanelView {
  const uint8_t *payload, *scales, *offsets;  // of the first block of the chunk
  int64_t blocks;
  __m512i table;
  uint8_t* unpacked;  // [blocks or kRing][kTileBytes]
};

struct RowTile {
  const uint8_t* a;   // prepared inputs of the first block: [blocks][hi, lo][rows][tile_k]
  const float* sums;  // [blocks][16]
  int64_t rows;       // of the A tile's hi part
  int64_t valid;      // rows that exist in y
};

struct Output {
  float* y;
  int64_t ldy;
  __mmask16 mask;  // columns that exist
  bool first;      // start from zero instead of from y
};

constexpr int64_t kLag = 4;          // products stored before the epilogue reads them back
constexpr int64_t kAhead = 2;        // blocks unpacked before they are multiplied, so that stores have reached L1
constexpr int64_t kRing = 8;         // unpacked blocks kept when nothing reuses them
constexpr int64_t kPrefetch = 4096;  // bytes of payload requested ahead

template <bool V>
struct Bool {
  static constexpr bool value = V;
};

// The tile instructions name registers by literals, so each parity of a block has its own text.
template <bool Odd, bool Lo>
inline void multiply_block() {
  if constexpr (Odd) {
    _tile_zero(1);
    _tile_dpbf16ps(1, 5, 3);
    if constexpr (Lo) _tile_dpbf16ps(1, 7, 3);
  } else {
    _tile_zero(0);
    _tile_dpbf16ps(0, 4, 2);
    if constexpr (Lo) _tile_dpbf16ps(0, 6, 2);
  }
}

template <bool Odd>
inline void store_block(float* c) {
  if constexpr (Odd) {
    _tile_stored(1, c, 64);
  } else {
    _tile_stored(0, c, 64);
  }
}

// R: rows the epilogue handles (>= rows). Stacked: hi and lo rows in one tile. Unpack: this is the first row tile to
// see the chunk, so unpack it on the way.
template <Payload P, int TileK, bool Offset, bool F16, bool Lo, int R, bool Stacked, bool Unpack>
__attribute__((noinline)) void multiply(const PanelView& w, const RowTile& x, const Output& out, int64_t ring_mask) {
  alignas(64) float c[kLag][kTileRows * kTileColumns];
  constexpr int64_t kScaleBytes = kTileColumns * (F16 ? 2 : 4);
  constexpr int64_t kPayloadBytes = TileK * kTileColumns / (P == Payload::u4 ? 2 : 1);
  constexpr int64_t kRowBytes = TileK * 2;
  const int64_t a_bytes = x.rows * kRowBytes * (Lo ? 2 : 1);
  const int64_t c_lo = Stacked && Lo ? x.rows * kTileColumns : 0;

  __m512 acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    acc[r] = out.first || r >= x.valid ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(out.mask, out.y + r * out.ldy);
  }
  const auto epilogue = [&](int64_t g) __attribute__((always_inline)) {
    const float* tile = c[g % kLag];
    const __m512 scale = load_scales<F16>(w.scales + g * kScaleBytes);
    const __m512 offset = Offset ? load_scales<F16>(w.offsets + g * kScaleBytes) : scale;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __m512 v = _mm512_load_ps(tile + r * kTileColumns);
      if constexpr (Stacked && Lo) v = _mm512_add_ps(v, _mm512_load_ps(tile + c_lo + r * kTileColumns));
      acc[r] = _mm512_fmadd_ps(v, scale, acc[r]);
      if constexpr (Offset) acc[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sums[g * kTileRows + r]), acc[r]);
    }
  };
  const auto unpack_block = [&](int64_t g) __attribute__((always_inline)) {
    const uint8_t* from = w.payload + g * kPayloadBytes;
    for (int64_t i = 0; i < kPayloadBytes; i += 64) _mm_prefetch((const char*)from + kPrefetch + i, _MM_HINT_T0);
    unpack<P, TileK>(from, w.table, w.unpacked + (g & ring_mask) * kTileBytes);
  };

  const auto load_block = [&](auto odd, int64_t g) __attribute__((always_inline)) {
    const uint8_t* a = x.a + g * a_bytes;
    const uint8_t* b = w.unpacked + (g & ring_mask) * kTileBytes;
    memory_barrier();
    if constexpr (decltype(odd)::value) {
      _tile_loadd(3, b, 64);
      _tile_loadd(5, a, kRowBytes);
      if constexpr (Lo && !Stacked) _tile_loadd(7, a + a_bytes / 2, kRowBytes);
    } else {
      _tile_loadd(2, b, 64);
      _tile_loadd(4, a, kRowBytes);
      if constexpr (Lo && !Stacked) _tile_loadd(6, a + a_bytes / 2, kRowBytes);
    }
  };
  const auto step = [&](auto odd, int64_t g) __attribute__((always_inline)) {
    constexpr bool kOdd = decltype(odd)::value;
    if (g + 1 < w.blocks) load_block(Bool<!kOdd>(), g + 1);
    multiply_block<kOdd, Lo && !Stacked>();
    if (g > 0) store_block<!kOdd>(c[(g - 1) % kLag]);
  };

  if constexpr (Unpack) {
    for (int64_t g = 0; g < kAhead && g < w.blocks; ++g) unpack_block(g);
  }
  load_block(Bool<false>(), 0);
  for (int64_t g = 0; g < w.blocks; ++g) {
    if constexpr (Unpack) {
      if (g + kAhead < w.blocks) unpack_block(g + kAhead);
    }
    if (g > kLag) epilogue(g - 1 - kLag);
    g & 1 ? step(Bool<true>(), g) : step(Bool<false>(), g);
  }
  const int64_t last = w.blocks - 1;
  if (last >= kLag) epilogue(last - kLag);
  last & 1 ? store_block<true>(c[last % kLag]) : store_block<false>(c[last % kLag]);
  for (int64_t g = last < kLag ? 0 : last + 1 - kLag; g <= last; ++g) epilogue(g);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r < x.valid) _mm512_mask_storeu_ps(out.y + r * out.ldy, out.mask, acc[r]);
  }
}

template <Payload P, int TileK, bool Offset, bool F16, bool Lo>
void multiply_stacked(const PanelView& w, const RowTile& x, const Output& out) {
  const auto run = x.rows == 1   ? multiply<P, TileK, Offset, F16, Lo, 1, true, true>
                   : x.rows == 2 ? multiply<P, TileK, Offset, F16, Lo, 2, true, true>
                   : x.rows <= 4 ? multiply<P, TileK, Offset, F16, Lo, 4, true, true>
                                 : multiply<P, TileK, Offset, F16, Lo, 8, true, true>;
  run(w, x, out, kRing - 1);
}

// Where block `g` of the panel that starts at column n lies.
PanelView panel_view(const AmxWeights& w, int64_t n, int64_t g, int64_t blocks, __m512i table, uint8_t* unpacked) {
  const uint8_t* payload = w.data + n / kTileColumns * w.panel_bytes;
  const uint8_t* scales = payload + w.blocks * w.payload_bytes;
  const uint8_t* offsets = scales + w.blocks * w.scale_bytes;
  return {
      payload + g * w.payload_bytes, scales + g * w.scale_bytes, offsets + g * w.scale_bytes, blocks, table, unpacked};
}

__mmask16 columns_mask(int64_t n, int64_t end) {
  return static_cast<__mmask16>(end - n < kTileColumns ? (1u << (end - n)) - 1 : 0xffff);
}

// Up to 8 rows: weights are unpacked to a small ring and used once.
template <Payload P, int TileK, bool Offset, bool F16, bool Lo>
void run_few_rows(const AmxWeights& w, const uint8_t* prepared, int64_t rows, float* y, int64_t ldy,
                  int64_t column_begin, int64_t column_end) {
  alignas(64) uint8_t unpacked[kRing * kTileBytes];
  const auto* sums = reinterpret_cast<const float*>(prepared + w.blocks * rows * TileK * 2 * (Lo ? 2 : 1));
  const RowTile x{prepared, sums, rows, rows};
  const __m512i table = code_table(w.min_q);
  configure(Lo ? 2 * rows : rows, TileK);
  for (int64_t n = column_begin; n < column_end; n += kTileColumns) {
    const PanelView panel = panel_view(w, n, 0, w.blocks, table, unpacked);
    multiply_stacked<P, TileK, Offset, F16, Lo>(panel, x, {y + n, ldy, columns_mask(n, column_end), true});
  }
  _tile_release();
}

// More rows: a chunk of features of a few panels is unpacked once and used by every row tile, whose inputs stay in L1
// from one panel to the next. Accumulators rest in y between chunks.
template <Payload P, int TileK, bool Offset, bool F16, bool Lo>
void run_many_rows(const AmxWeights& w, const uint8_t* prepared, int64_t rows, float* y, int64_t ldy,
                   int64_t column_begin, int64_t column_end) {
  alignas(64) uint8_t unpacked[kGroupPanels * kChunkBlocks * kTileBytes];
  constexpr int64_t kBlockBytes = kTileRows * TileK * 2 * (Lo ? 2 : 1);
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const auto* sums = reinterpret_cast<const float*>(prepared + row_tiles * w.blocks * kBlockBytes);
  const __m512i table = code_table(w.min_q);
  configure(kTileRows, TileK);
  for (int64_t group = column_begin; group < column_end; group += kGroupPanels * kTileColumns) {
    const int64_t rest = column_end - group;
    const int64_t group_end = rest < kGroupPanels * kTileColumns ? column_end : group + kGroupPanels * kTileColumns;
    for (int64_t g = 0; g < w.blocks; g += kChunkBlocks) {
      const int64_t blocks = w.blocks - g < kChunkBlocks ? w.blocks - g : kChunkBlocks;
      for (int64_t m = 0; m < rows; m += kTileRows) {
        const int64_t at = m / kTileRows * w.blocks + g;
        const int64_t valid = rows - m < kTileRows ? rows - m : kTileRows;
        const RowTile x{prepared + at * kBlockBytes, sums + at * kTileRows, kTileRows, valid};
        uint8_t* scratch = unpacked;
        for (int64_t n = group; n < group_end; n += kTileColumns, scratch += kChunkBlocks * kTileBytes) {
          const PanelView panel = panel_view(w, n, g, blocks, table, scratch);
          const Output out{y + m * ldy + n, ldy, columns_mask(n, column_end), g == 0};
          if (m == 0) {
            multiply<P, TileK, Offset, F16, Lo, kTileRows, false, true>(panel, x, out, -1);
          } else {
            multiply<P, TileK, Offset, F16, Lo, kTileRows, false, false>(panel, x, out, -1);
          }
        }
      }
    }
  }
  _tile_release();
}

template <Payload P, int TileK, bool Offset, bool F16, bool Lo>
void run_quantized(const AmxWeights& w, const uint8_t* prepared, int64_t rows, float* y, int64_t ldy,
                   int64_t column_begin, int64_t column_end) {
  const auto run =
      rows <= kStackedRows ? run_few_rows<P, TileK, Offset, F16, Lo> : run_many_rows<P, TileK, Offset, F16, Lo>;
  run(w, prepared, rows, y, ldy, column_begin, column_end);
}

// ---- plain bf16 weights: the packed form is the tiles, and sums stay in their registers over all features
// -----------------

// Tile registers: 0 to 3 sum the products of two row tiles and two panels, 4 and 5 hold weights, 6 and 7 inputs.
constexpr int64_t kPairRows = 2 * kTileRows, kPairColumns = 2 * kTileColumns;
// Inputs of so many bytes are multiplied by all panels before the next ones: they come from L2 again and again.
constexpr int64_t kInputBytes = 768 << 10;

struct PairOfTiles {
  const uint8_t *x, *weights;
  int64_t blocks, x_bytes, block_bytes, part, weight_bytes;  // from one row tile, block, half, panel to the next
};

// One or two row tiles by one or two panels; of each output the same sum, block after block, the lower half after the
// upper one.
template <bool Lo, int Tiles, int Panels>
inline __attribute__((always_inline)) void multiply_bf16(const PairOfTiles& at,
                                                         float (*sums)[kTileRows * kTileColumns]) {
  const uint8_t *x = at.x, *weights = at.weights;
  const auto products = [&](int64_t part) __attribute__((always_inline)) {
    tile_load<6>(x + part, 64);
    tile_multiply_bf16<0, 6, 4>();
    if constexpr (Panels == 2) tile_multiply_bf16<1, 6, 5>();
    if constexpr (Tiles == 2) {
      tile_load<7>(x + at.x_bytes + part, 64);
      tile_multiply_bf16<2, 7, 4>();
      if constexpr (Panels == 2) tile_multiply_bf16<3, 7, 5>();
    }
  };
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t g = 0; g < at.blocks; ++g, x += at.block_bytes, weights += kTileBytes) {
    tile_load<4>(weights, 64);
    if constexpr (Panels == 2) tile_load<5>(weights + at.weight_bytes, 64);
    products(0);
    if constexpr (Lo) products(at.part);
  }
  tile_store<0>(sums[0], 64);
  if constexpr (Panels == 2) tile_store<1>(sums[1], 64);
  if constexpr (Tiles == 2) tile_store<2>(sums[2], 64);
  if constexpr (Tiles == 2 && Panels == 2) tile_store<3>(sums[3], 64);
}

template <bool Lo>
void run_bf16(const AmxWeights& w, const uint8_t* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
              int64_t column_end) {
  alignas(64) float sums[4][kTileRows * kTileColumns];
  const int64_t tile_rows = rows <= kStackedRows ? rows : kTileRows;
  const int64_t part = tile_rows * 64, block_bytes = part * (Lo ? 2 : 1), x_bytes = w.blocks * block_bytes;
  const int64_t fitting = kInputBytes / x_bytes * kTileRows / kPairRows * kPairRows;
  const int64_t chunk = fitting < kPairRows ? kPairRows : fitting;

  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, tile == 4 || tile == 5 ? kTileRows : tile_rows, 64);
  config.load();
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = smaller(begin + chunk, rows);
    for (int64_t n = column_begin; n < column_end; n += kPairColumns) {
      const uint8_t* panel = w.data + n / kTileColumns * w.panel_bytes;
      const bool two_panels = column_end - n > kTileColumns;
      for (int64_t m = begin; m < end; m += kPairRows) {
        const bool two_tiles = end - m > kTileRows;
        const PairOfTiles at{
            prepared + m / kTileRows * x_bytes, panel, w.blocks, x_bytes, block_bytes, part, w.panel_bytes};
        const auto run = two_tiles    ? two_panels ? multiply_bf16<Lo, 2, 2> : multiply_bf16<Lo, 2, 1>
                         : two_panels ? multiply_bf16<Lo, 1, 2>
                                      : multiply_bf16<Lo, 1, 1>;
        run(at, sums);
        for (int64_t i = 0; i < (two_tiles ? 2 : 1); ++i) {
          for (int64_t j = 0; j < (two_panels ? 2 : 1); ++j) {
            const int64_t column = n + j * kTileColumns, row = m + i * kTileRows;
            for (int64_t r = 0; r < kTileRows && row + r < end; ++r) {
              _mm512_mask_storeu_ps(y + (row + r) * ldy + column, columns_mask(column, column_end),
                                    _mm512_load_ps(sums[2 * i + j] + r * kTileColumns));
            }
          }
        }
      }
    }
  }
  release_tiles();
}

}  // namespace

void amx_run(const AmxWeights& w, const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
             int64_t column_end) {
  const auto* a = static_cast<const uint8_t*>(prepared);
  const bool lo = w.activation == Activation::f32;
  const auto call = [&](auto kernel_f32, auto kernel_bf16) {
    (lo ? kernel_f32 : kernel_bf16)(w, a, rows, y, ldy, column_begin, column_end);
  };
  // The combinations that formats come in: q4_0; q4_1; q4_k; q2_k; q3_k; q5_0 and q8_0; q5_1; q5_k; q6_k.
#define HEADRACE_AMX(payload, tile_k, offset, f16) \
  call(run_quantized<payload, tile_k, offset, f16, true>, run_quantized<payload, tile_k, offset, f16, false>)
  if (w.payload == Payload::bf16) {
    call(run_bf16<true>, run_bf16<false>);
  } else if (w.payload == Payload::u4) {
    if (w.tile_k == 32 && w.f16_scales) {
      w.has_offset ? HEADRACE_AMX(Payload::u4, 32, true, true) : HEADRACE_AMX(Payload::u4, 32, false, true);
    } else if (w.tile_k == 32) {
      HEADRACE_AMX(Payload::u4, 32, true, false);
    } else {
      w.has_offset ? HEADRACE_AMX(Payload::u4, 16, true, false) : HEADRACE_AMX(Payload::u4, 16, false, false);
    }
  } else if (w.tile_k == 16) {
    HEADRACE_AMX(Payload::i8, 16, false, false);
  } else if (w.f16_scales) {
    w.has_offset ? HEADRACE_AMX(Payload::i8, 32, true, true) : HEADRACE_AMX(Payload::i8, 32, false, true);
  } else {
    HEADRACE_AMX(Payload::i8, 32, true, false);
  }
#undef HEADRACE_AMX
}

}  // namespace headrace
