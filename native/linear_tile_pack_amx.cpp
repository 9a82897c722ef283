// What the AMX kernels read, made from what callers have: f32 inputs to bf16 tiles, decoded weights to packed panels.
#include <immintrin.h>

#include "linear_tile.h"

namespace headrace {
namespace {

using Payload = AmxWeights::Payload;

// Round 32 features to bf16 and return what the rounding left, which is exact in f32.
inline __m512i round_bf16(__m512& v0, __m512& v1) {
  const __m512i hi = (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
  const auto widen = [](__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); };
  v0 = _mm512_sub_ps(v0, widen(_mm512_castsi512_si256(hi)));
  v1 = _mm512_sub_ps(v1, widen(_mm512_extracti64x4_epi64(hi, 1)));
  return hi;
}

// Lane n of the result is the four bytes at base[n * stride].
inline __m512i column_dwords(const uint8_t* base, int64_t stride) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_i32gather_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride))), base, 1);
}

// Four codes (one per byte, k = 0..3) to nibbles at bits 0, 16, 4, 20: even k in the low word, odd k in the high.
inline __m512i spread_nibbles(__m512i d) {
  const auto take = [&](int mask, int right) {
    return _mm512_srl_epi32(_mm512_and_si512(d, _mm512_set1_epi32(mask)), _mm_cvtsi32_si128(right));
  };
  const __m512i k0 = take(0x0000000f, 0), k1 = _mm512_slli_epi32(take(0x00000f00, 0), 8);
  const __m512i k2 = take(0x000f0000, 12), k3 = take(0x0f000000, 4);
  return _mm512_or_si512(_mm512_or_si512(k0, k1), _mm512_or_si512(k2, k3));
}

void pack_block(const AmxWeights& w, const uint8_t* q, int64_t stride, uint8_t* out) {
  if (w.payload == Payload::bf16) {
    for (int64_t k = 0; k < w.tile_k; k += 2) _mm512_store_si512(out + k * 32, column_dwords(q + k * 2, stride * 2));
  } else if (w.payload == Payload::i8) {
    const __m512i bias = _mm512_set1_epi8(-128);
    for (int64_t k = 0; k < w.tile_k; k += 4) {
      _mm512_storeu_si512(out + k * 16, _mm512_xor_si512(column_dwords(q + k, stride), bias));
    }
  } else {
    const __m512i bias = _mm512_set1_epi8(static_cast<char>(w.min_q));
    for (int64_t k = 0; k < w.tile_k; k += 8) {
      const __m512i d0 = _mm512_sub_epi8(column_dwords(q + k, stride), bias);
      const __m512i d1 = _mm512_sub_epi8(column_dwords(q + k + 4, stride), bias);
      const __m512i high = _mm512_slli_epi32(spread_nibbles(d1), 8);
      _mm512_storeu_si512(out + k * 8, _mm512_or_si512(spread_nibbles(d0), high));
    }
  }
}

void pack_scales(const AmxWeights& w, const float* scale, uint8_t* out) {
  for (int64_t g = 0; g < w.blocks; ++g, out += w.scale_bytes) {
    const __m512 v = _mm512_castsi512_ps(column_dwords((const uint8_t*)(scale + g), w.blocks * 4));
    if (w.f16_scales) {
      _mm256_storeu_si256((__m256i*)out, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    } else {
      _mm512_storeu_ps(out, v);
    }
  }
}

}  // namespace

void amx_prepare(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features, void* prepared,
                 int64_t row_begin, int64_t row_end) {
  const bool lo = form.activation == Activation::f32;
  const int64_t tile_k = form.layout, blocks = (features + tile_k - 1) / tile_k;
  const int64_t tile_rows = rows <= kStackedRows ? rows : kTileRows;
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t part = tile_rows * tile_k * 2, block_bytes = part * (lo ? 2 : 1);
  uint8_t* const out = static_cast<uint8_t*>(prepared);
  float* const sums = reinterpret_cast<float*>(out + row_tiles * blocks * block_bytes);
  // The rows that pad the last tile are zeros.
  const int64_t end = row_end == rows ? (row_tiles - 1) * kTileRows + tile_rows : row_end;
  for (int64_t m = row_begin; m < end; ++m) {
    const int64_t t = m / kTileRows, r = m % kTileRows;
    for (int64_t k = 0; k < features; k += 32) {
      const auto lanes = [&](int64_t from) {
        const int64_t n = m >= rows ? 0 : features - from;
        return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
      };
      __m512 v0 = _mm512_maskz_loadu_ps(lanes(k), x + m * ldx + k);
      __m512 v1 = _mm512_maskz_loadu_ps(lanes(k + 16), x + m * ldx + k + 16);
      const __m512 x0 = v0, x1 = v1;
      const __m512i hi = round_bf16(v0, v1);
      const __m512i rest = (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
      const __m512 s0 = lo ? x0 : _mm512_sub_ps(x0, v0), s1 = lo ? x1 : _mm512_sub_ps(x1, v1);
      uint8_t* to = out + (t * blocks + k / tile_k) * block_bytes + r * tile_k * 2;
      float* sum = sums + (t * blocks + k / tile_k) * kTileRows + r;
      if (tile_k == 32) {
        _mm512_storeu_si512(to, hi);
        if (lo) _mm512_storeu_si512(to + part, rest);
        if (form.group != 0) *sum = _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
      } else {
        _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(hi));
        _mm256_storeu_si256((__m256i*)(to + block_bytes), _mm512_extracti64x4_epi64(hi, 1));
        if (lo) _mm256_storeu_si256((__m256i*)(to + part), _mm512_castsi512_si256(rest));
        if (lo) _mm256_storeu_si256((__m256i*)(to + block_bytes + part), _mm512_extracti64x4_epi64(rest, 1));
        if (form.group != 0) {
          sum[0] = _mm512_reduce_add_ps(s0);
          sum[kTileRows] = _mm512_reduce_add_ps(s1);
        }
      }
    }
  }
}

void amx_pack_panel(const AmxWeights& w, int64_t panel, const void* q, int64_t stride, const float* scale,
                    const float* offset) {
  uint8_t* out = w.data + panel * w.panel_bytes;
  const int64_t value_bytes = w.payload == Payload::bf16 ? 2 : 1;
  for (int64_t g = 0; g < w.blocks; ++g) {
    const uint8_t* from = static_cast<const uint8_t*>(q) + g * w.tile_k * value_bytes;
    pack_block(w, from, stride, out + g * w.payload_bytes);
  }
  out += w.blocks * w.payload_bytes;
  if (w.has_scale) pack_scales(w, scale, out);
  if (w.has_offset) pack_scales(w, offset, out + w.blocks * w.scale_bytes);
}

}  // namespace headrace
