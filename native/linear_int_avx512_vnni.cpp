// The integer kernels on AVX-512 with VNNI. Ice Lake starts two 512-bit operations a cycle, products or others, and one
// broadcast: unpacking and scaling count as much as products do, and broadcasts are shared.
#include <immintrin.h>

#include <cmath>

#include "linear_int.h"
#include "simd.h"

namespace headrace {
namespace {

using Payload = IntWeights::Payload;

constexpr int64_t kLanes = 16;
constexpr int kBlockRows = 6, kBlockPanels = 2;  // of accumulators that stay in registers when rows are many
constexpr int64_t kChunkBytes = 16 << 10;        // bytes of unpacked weights that share L1 with the inputs

// ---- inputs ---------------------------------------------------------------------------------------------------------

// Largest magnitude of a group, as bits: for these NaN is larger than infinity, and infinity than all else.
template <int Group>
inline float largest(const __m512* x) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_and_si512(_mm512_castps_si512(x[0]), mask);
  if constexpr (Group == 32) most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x[1]), mask));
  const int bits = _mm512_reduce_max_epi32(most);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// One group of one row in fixed point: q and what goes with it. A group whose largest magnitude is below 2^-100 counts
// as zero; one that holds a NaN or an infinity makes NaNs of all its outputs.
template <int Group>
inline IntGroup to_integers(const float* x, Activation activation, int32_t min_q, __m512i* q) {
  constexpr int kVectors = Group / kLanes;
  __m512 v[kVectors];
  for (int i = 0; i < kVectors; ++i) v[i] = _mm512_loadu_ps(x + i * kLanes);
  const float top = activation == Activation::int8 ? kTopInt8 : kTopInt16;
  const float most = largest<Group>(v);
  const bool empty = most < 0x1p-100f;
  const __m512 inverse = _mm512_set1_ps(empty ? 0.0f : top / most);
  __m512i sum = _mm512_setzero_si512(), low_sum = sum;
  for (int i = 0; i < kVectors; ++i) {
    q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(q[i], 24), 24);
    sum = _mm512_add_epi32(sum, q[i]);
    low_sum = _mm512_add_epi32(low_sum, low);
  }
  const int32_t total = _mm512_reduce_add_epi32(sum), low = _mm512_reduce_add_epi32(low_sum);
  const float scale = empty ? 0.0f : std::isfinite(most) ? most / top : NAN;
  return {scale, static_cast<float>(total) * scale, min_q * ((total - low) >> 8), min_q * low};
}

// Few rows: high and low bytes side by side.
template <int Group>
void prepare_bytes(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features, uint8_t* bytes,
                   IntGroup* groups, int64_t row_begin, int64_t row_end) {
  const bool wide = form.activation != Activation::int8;
  const int64_t padded = padded_rows(rows), step = wide ? 2 * Group : Group;
  for (int64_t r = row_begin; r < row_end; ++r) {
    for (int64_t g = 0; g < features / Group; ++g) {
      __m512i q[Group / kLanes];
      groups[g * padded + r] = to_integers<Group>(x + r * ldx + g * Group, form.activation, form.layout, q);
      uint8_t* out = bytes + (g * padded + r) * step;
      for (int i = 0; i < Group / kLanes; ++i) {
        const __m512i rounded = _mm512_add_epi32(q[i], _mm512_set1_epi32(128));
        if (wide) _mm_storeu_si128((__m128i*)(out + i * kLanes), _mm512_cvtepi32_epi8(_mm512_srai_epi32(rounded, 8)));
        _mm_storeu_si128((__m128i*)(out + (wide ? Group : 0) + i * kLanes), _mm512_cvtepi32_epi8(q[i]));
      }
    }
  }
}

// Many rows: words in the order in which `unpack` leaves codes, or bytes.
template <int Group>
void prepare_words(const InputForm& form, const float* x, int64_t ldx, int64_t features, uint8_t* out, IntGroup* groups,
                   int64_t row_begin, int64_t row_end) {
  const bool wide = form.activation != Activation::int8;
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  for (int64_t r = row_begin; r < row_end; ++r) {
    for (int64_t g = 0; g < features / Group; ++g) {
      __m512i q[Group / kLanes];
      groups[r * (features / Group) + g] = to_integers<Group>(x + r * ldx + g * Group, form.activation, form.layout, q);
      for (int i = 0; i < Group / kLanes; ++i) {
        const int64_t at = r * features + g * Group + i * kLanes;
        if (wide) {
          _mm256_storeu_si256((__m256i*)(out + 2 * at), _mm512_cvtepi32_epi16(_mm512_permutexvar_epi32(order, q[i])));
        } else {
          _mm_storeu_si128((__m128i*)(out + at), _mm512_cvtepi32_epi8(q[i]));
        }
      }
    }
  }
}

// ---- what both kernels share ----------------------------------------------------------------------------------------

inline __m512 load_f16_scales(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline __m512 load_bf16_scales(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 load_multiples(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

// A format's groups as vectors.
template <typename Base>
struct Layout : Base {
  // What a block's groups share.
  struct Header {
    __m512 d, negative_dmin;
  };
  static Header header(const uint8_t* block) {
    const __m512 d = Base::TwoLevels ? load_f16_scales(block) : _mm512_setzero_ps();
    return Header{
        d, Base::TwoLevels && Base::Offset ? _mm512_sub_ps(_mm512_setzero_ps(), load_f16_scales(block + 32)) : d};
  }
  // As `decode_quants` computes them, bit for bit.
  static __m512 scale(const Header& h, const uint8_t* group) {
    if constexpr (Base::Scales == ScaleType::f32) return _mm512_loadu_ps(group + Base::kCodeBytes);
    if constexpr (Base::Scales == ScaleType::bf16) return load_bf16_scales(group + Base::kCodeBytes);
    if constexpr (!Base::TwoLevels) return load_f16_scales(group + Base::kCodeBytes);
    return _mm512_mul_ps(h.d, load_multiples(group + Base::kCodeBytes));
  }
  static __m512 offset(const Header& h, const uint8_t* group) {
    if constexpr (!Base::Offset) return _mm512_setzero_ps();
    if constexpr (Base::ZeroPoints) {
      const __m512 zeros = load_multiples(group + Base::kCodeBytes + Base::kScaleBytes);
      return _mm512_mul_ps(scale(h, group), _mm512_sub_ps(_mm512_setzero_ps(), zeros));
    }
    if constexpr (!Base::TwoLevels) return load_f16_scales(group + Base::kCodeBytes + Base::kScaleBytes);
    return _mm512_mul_ps(h.negative_dmin, load_multiples(group + Base::kCodeBytes + Base::kScaleBytes));
  }

  // The codes of one quad of a group, four bytes of each column.
  static __m512i codes(const uint8_t* group, int64_t quad) {
    if constexpr (Base::kPayload == Payload::u8) return _mm512_loadu_si512(group + 64 * quad);
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(0x30);
    __m512i v = _mm512_loadu_si512(group + quad / 2 * 64);
    if (quad % 2) v = _mm512_srli_epi16(v, 4);
    v = _mm512_and_si512(v, low);
    if constexpr (Base::kPayload == Payload::u4) return v;
    __m512i h = _mm512_loadu_si512(group + Base::Group * 8 + quad / 4 * 64);
    if (quad % 4 < 2) h = _mm512_slli_epi16(h, 4 - quad % 4 * 2);
    if (quad % 4 == 3) h = _mm512_srli_epi16(h, 2);
    return _mm512_ternarylogic_epi32(v, h, high, 0xf8);  // v | (h & high)
  }
};

inline __m512i broadcast_dword(const void* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  return _mm512_set1_epi32(value);
}

// The dot products by name: around their intrinsics GCC 12 copies every accumulator twice, which halves the kernels.
// sum += unsigned codes * signed bytes
inline void add_bytes(__m512i& sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}
// sum += signed words * signed words
inline void add_words(__m512i& sum, __m512i codes, __m512i x) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}

// One link of the chain of linear_int.h.
template <bool Offset>
inline __m512 scaled(__m512 y, __m512 sum, __m512 scale, __m512 offset, const IntGroup& x) {
  y = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(x.scale)), y);
  return Offset ? _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sum), y) : y;
}

inline __mmask16 columns_mask(int64_t n, int64_t end) {
  return static_cast<__mmask16>(end - n < kIntPanel ? (1u << (end - n)) - 1 : 0xffff);
}

// ---- few rows: weights are read once, straight from memory ----------------------------------------------------------

// Rows [m, m + R) of `padded` and a few panels from column n on. Panels share the broadcast of each input: the machine
// makes one a cycle, and two products.
template <typename L, bool Wide, int R, int Panels>
void multiply_bytes(const IntWeights& w, const void* prepared, int64_t padded, int64_t m, int64_t rows, float* y,
                    int64_t ldy, int64_t n, int64_t column_end) {
  constexpr int64_t kStep = Wide ? 2 * L::Group : L::Group;
  const int64_t num_groups = w.in_features / L::Group;
  const auto* bytes = static_cast<const uint8_t*>(prepared);
  const auto* groups = reinterpret_cast<const IntGroup*>(bytes + num_groups * padded * kStep) + m;
  const uint8_t* p[Panels];
  const uint8_t* all = w.data + n / kIntPanel * w.panel_bytes;  // of the panels, which lie one behind the other
  typename L::Header header[Panels];
  __m512 acc[R][Panels];
#pragma GCC unroll 2
  for (int i = 0; i < Panels; ++i) {
    p[i] = all + i * w.panel_bytes;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][i] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint8_t* x = bytes + (g * padded + m) * kStep;
    const IntGroup* xg = groups + g * padded;
    ask_far<Panels * L::kGroupBytes>(all + g * Panels * L::kGroupBytes);
    __m512i high[R][Panels], low[R][Panels];
#pragma GCC unroll 2
    for (int i = 0; i < Panels; ++i) {
      if (g % L::kBlockGroups == 0) {
        header[i] = L::header(p[i]);
        p[i] += L::kHeaderBytes;
      }
      ask_near<L::kGroupBytes>(p[i]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        high[r][i] = _mm512_set1_epi32(xg[r].bias_hi);
        low[r][i] = _mm512_set1_epi32(xg[r].bias_lo);
      }
    }
#pragma GCC unroll 8
    for (int64_t quad = 0; quad < L::Group / kQuad; ++quad) {
      __m512i codes[Panels];
#pragma GCC unroll 2
      for (int i = 0; i < Panels; ++i) codes[i] = L::codes(p[i], quad);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t* at = x + r * kStep + quad * kQuad;
        const __m512i x_high = broadcast_dword(at), x_low = Wide ? broadcast_dword(at + L::Group) : x_high;
#pragma GCC unroll 2
        for (int i = 0; i < Panels; ++i) {
          if constexpr (Wide) add_bytes(high[r][i], codes[i], x_high);
          add_bytes(low[r][i], codes[i], x_low);
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < Panels; ++i) {
      const __m512 scale = L::scale(header[i], p[i]), offset = L::offset(header[i], p[i]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        // Both are exact, so this rounds their sum once, as a conversion of the whole sum would.
        __m512 sum = _mm512_cvtepi32_ps(low[r][i]);
        if constexpr (Wide) sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r][i]), _mm512_set1_ps(256.0f), sum);
        acc[r][i] = scaled<L::Offset>(acc[r][i], sum, scale, offset, xg[r]);
      }
      p[i] += L::kGroupBytes;
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < Panels; ++i) {
    const __mmask16 mask = columns_mask(n + i * kIntPanel, column_end);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (m + r < rows) _mm512_mask_storeu_ps(y + (m + r) * ldy + n + i * kIntPanel, mask, acc[r][i]);
    }
  }
}

template <typename L, bool Wide, int R>
void run_bytes(const IntWeights& w, const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
               int64_t column_end) {
  const int64_t padded = padded_rows(rows);
  for (int64_t n = column_begin; n < column_end; n += kBlockPanels * kIntPanel) {
    for (int64_t m = 0; m < padded; m += R) {  // the second time, weights come from L1
      if (n + kIntPanel < column_end) {
        multiply_bytes<L, Wide, R, kBlockPanels>(w, prepared, padded, m, rows, y, ldy, n, column_end);
      } else {
        multiply_bytes<L, Wide, R, 1>(w, prepared, padded, m, rows, y, ldy, n, column_end);
      }
    }
  }
}

// ---- many rows: a chunk of a few panels is unpacked once and used by all rows ---------------------------------------

// Codes of one group: as signed words, two vectors a quad, (k0, k2) and (k1, k3) of each column; or, not Wide, as
// bytes, min_q still to be added.
template <typename L, bool Wide>
inline void unpack(const uint8_t* group, int32_t min_q, uint8_t* out, int64_t stride) {
  const __m512i even = _mm512_set1_epi32(0x00ff00ff), min = _mm512_set1_epi16(static_cast<int16_t>(min_q));
#pragma GCC unroll 8
  for (int64_t quad = 0; quad < L::Group / kQuad; ++quad) {
    const __m512i codes = L::codes(group, quad);
    if constexpr (Wide) {
      const __m512i first = _mm512_and_si512(codes, even), second = _mm512_srli_epi16(codes, 8);
      _mm512_store_si512(out + 2 * quad * stride, _mm512_add_epi16(first, min));
      _mm512_store_si512(out + (2 * quad + 1) * stride, _mm512_add_epi16(second, min));
    } else {
      _mm512_store_si512(out + quad * stride, codes);
    }
  }
}

// Unpacked groups of a chunk: vectors [group][quad or half quad][panel], scales and offsets [group][panel].
struct Chunk {
  const uint8_t* codes;
  const float *scales, *offsets;
  int64_t groups;
};

struct Inputs {
  const uint8_t* values;   // of the first row and the chunk's first feature
  const IntGroup* groups;  // likewise
  int64_t ld, ld_groups;   // bytes, groups
};

template <int Group, bool Offset, bool Wide, int R, int Panels>
__attribute__((noinline)) void multiply(const Chunk& w, const Inputs& x, float* y, int64_t ldy, const __mmask16* masks,
                                        bool first) {
  constexpr int64_t kVectors = Wide ? Group / 2 : Group / 4;
  __m512 acc[R][Panels];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) {
      acc[r][p] = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(masks[p], y + r * ldy + p * kIntPanel);
    }
  }
  const uint8_t* codes = w.codes;
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i sum[R][Panels];
    const uint8_t* values = x.values + g * Group * (Wide ? 2 : 1);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < Panels; ++p) {
        sum[r][p] = Wide ? _mm512_setzero_si512() : _mm512_set1_epi32(x.groups[r * x.ld_groups + g].bias_lo);
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kVectors; ++i) {
      __m512i c[Panels];
#pragma GCC unroll 2
      for (int p = 0; p < Panels; ++p) c[p] = _mm512_load_si512(codes + (i * Panels + p) * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i v = broadcast_dword(values + r * x.ld + i * 4);
#pragma GCC unroll 2
        for (int p = 0; p < Panels; ++p) {
          Wide ? add_words(sum[r][p], c[p], v) : add_bytes(sum[r][p], c[p], v);
        }
      }
    }
    codes += kVectors * Panels * 64;
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) {
      const __m512 scale = _mm512_load_ps(w.scales + (g * Panels + p) * kLanes);
      const __m512 offset = Offset ? _mm512_load_ps(w.offsets + (g * Panels + p) * kLanes) : scale;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        acc[r][p] =
            scaled<Offset>(acc[r][p], _mm512_cvtepi32_ps(sum[r][p]), scale, offset, x.groups[r * x.ld_groups + g]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) _mm512_mask_storeu_ps(y + r * ldy + p * kIntPanel, masks[p], acc[r][p]);
  }
}

template <int Group, bool Offset, bool Wide, int Panels>
void multiply_rows(int64_t rows, const Chunk& w, const Inputs& x, float* y, int64_t ldy, const __mmask16* masks,
                   bool first) {
  static constexpr decltype(&multiply<Group, Offset, Wide, 1, Panels>) kKernels[kBlockRows] = {
      multiply<Group, Offset, Wide, 1, Panels>, multiply<Group, Offset, Wide, 2, Panels>,
      multiply<Group, Offset, Wide, 3, Panels>, multiply<Group, Offset, Wide, 4, Panels>,
      multiply<Group, Offset, Wide, 5, Panels>, multiply<Group, Offset, Wide, 6, Panels>};
  for (int64_t m = 0; m < rows; m += kBlockRows) {
    const int64_t block = rows - m < kBlockRows ? rows - m : kBlockRows;
    const Inputs at{x.values + m * x.ld, x.groups + m * x.ld_groups, x.ld, x.ld_groups};
    kKernels[block - 1](w, at, y + m * ldy, ldy, masks, first);
  }
}

template <typename L, bool Wide, int Panels>
void run_panels(const IntWeights& w, const Inputs& x, int64_t rows, float* y, int64_t ldy, int64_t n,
                int64_t column_end) {
  constexpr int64_t kCodeBytes = L::Group * kIntPanel * (Wide ? 2 : 1) * Panels;
  constexpr int64_t kGroups = kChunkBytes / kCodeBytes;  // whole blocks
  static_assert(kGroups % L::kBlockGroups == 0);
  alignas(64) uint8_t codes[kGroups * kCodeBytes];
  alignas(64) float scales[kGroups * Panels * kLanes], offsets[kGroups * Panels * kLanes];
  __mmask16 masks[Panels];
  for (int p = 0; p < Panels; ++p) masks[p] = columns_mask(n + p * kIntPanel, column_end);
  const int64_t all = w.in_features / L::Group;
  const uint8_t* ahead = w.data + n / kIntPanel * w.panel_bytes;  // goes through the panels one behind the other
  for (int64_t g0 = 0; g0 < all; g0 += kGroups) {
    const int64_t count = all - g0 < kGroups ? all - g0 : kGroups;
    for (int p = 0; p < Panels; ++p) {
      const uint8_t* from = w.data + (n / kIntPanel + p) * w.panel_bytes + g0 / L::kBlockGroups * L::kBlockBytes;
      typename L::Header header{};
      for (int64_t g = 0; g < count; ++g, from += L::kGroupBytes) {
        if (g % L::kBlockGroups == 0) {
          header = L::header(from);
          from += L::kHeaderBytes;
        }
        ask_far<L::kGroupBytes>(ahead);
        ahead += L::kGroupBytes;
        unpack<L, Wide>(from, w.min_q, codes + g * kCodeBytes + p * 64, Panels * 64);
        _mm512_store_ps(scales + (g * Panels + p) * kLanes, L::scale(header, from));
        if (L::Offset) _mm512_store_ps(offsets + (g * Panels + p) * kLanes, L::offset(header, from));
      }
    }
    const Inputs at{x.values + g0 * L::Group * (Wide ? 2 : 1), x.groups + g0, x.ld, x.ld_groups};
    multiply_rows<L::Group, L::Offset, Wide, Panels>(rows, {codes, scales, offsets, count}, at, y + n, ldy, masks,
                                                     g0 == 0);
  }
}

template <typename L, bool Wide>
void run_words(const IntWeights& w, const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
               int64_t column_end) {
  const auto* values = static_cast<const uint8_t*>(prepared);
  const int64_t ld = w.in_features * (Wide ? 2 : 1);
  const Inputs x{values, reinterpret_cast<const IntGroup*>(values + rows * ld), ld, w.in_features / L::Group};
  int64_t n = column_begin;
  for (; n + kIntPanel < column_end; n += kBlockPanels * kIntPanel) {
    run_panels<L, Wide, kBlockPanels>(w, x, rows, y, ldy, n, column_end);
  }
  if (n < column_end) run_panels<L, Wide, 1>(w, x, rows, y, ldy, n, column_end);
}

template <typename L, bool Wide>
IntKernel kernel_for_rows(int64_t rows) {
  if (rows > kFewRows) return run_words<L, Wide>;
  if (rows <= 2) return rows == 1 ? run_bytes<L, Wide, 1> : run_bytes<L, Wide, 2>;
  return run_bytes<L, Wide, 4>;
}

}  // namespace

void int_prepare_avx512_vnni(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features,
                             void* prepared, int64_t row_begin, int64_t row_end) {
  auto* bytes = static_cast<uint8_t*>(prepared);
  const int64_t width = form.activation == Activation::int8 ? 1 : 2;
  if (rows <= kFewRows) {
    auto* groups = reinterpret_cast<IntGroup*>(bytes + padded_rows(rows) * features * width);
    const auto run = form.group == 32 ? prepare_bytes<32> : prepare_bytes<16>;
    run(form, x, ldx, rows, features, bytes, groups, row_begin, row_end);
  } else {
    auto* groups = reinterpret_cast<IntGroup*>(bytes + rows * features * width);
    const auto run = form.group == 32 ? prepare_words<32> : prepare_words<16>;
    run(form, x, ldx, features, bytes, groups, row_begin, row_end);
  }
}

void int_run_avx512_vnni(const IntWeights& w, const void* prepared, int64_t rows, float* y, int64_t ldy,
                         int64_t column_begin, int64_t column_end) {
  const IntKernel run = with_layout(w, [&]<typename L>(L) {
    return w.activation == Activation::int8 ? kernel_for_rows<Layout<L>, false>(rows)
                                            : kernel_for_rows<Layout<L>, true>(rows);
  });
  run(w, prepared, rows, y, ldy, column_begin, column_end);
}

}  // namespace headrace
