// The fixed-point kernels. Everything but the entry points has internal linkage and no standard library code is used
// (see simd.h).
#include <immintrin.h>

#include "linear_fixed.h"
#include "tiles_amx.h"

namespace headrace {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 1024, kQuad = 4;
constexpr int64_t kPrefetch = 2048;     // bytes of weights requested ahead
constexpr int64_t kFarPrefetch = 6144;  // likewise, where products follow the decoding of a panel
// Inputs of so many bytes are multiplied by all panels before the next ones: they come from L2 again and again.
constexpr int64_t kInputBytes = 896 << 10;

inline __mmask16 columns_mask(int64_t n, int64_t end) {
  return static_cast<__mmask16>(end - n < kFixedPanel ? (1u << (end - n)) - 1 : 0xffff);
}

// The dot products by name: around their intrinsics GCC 12 copies every accumulator twice.
// sum += signed words * signed words
inline void add_words(__m512i& sum, __m512i a, __m512i x) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(x)); }
// sum += unsigned bytes * signed bytes
inline void add_bytes(__m512i& sum, __m512i a, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(x)); }

inline __m512i broadcast_dword(const void* p) {
  int32_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return _mm512_set1_epi32(value);
}

// What the kernels of one kind of weight know at compile time.
template <bool FourBits, int GroupSize, bool HasOffset>
struct Kind {
  static constexpr bool kFourBits = FourBits, kTiles = false;
  static constexpr int kGroup = GroupSize, kQuads = GroupSize / 4;
  static constexpr int64_t kCodeBytes = kFixedPanel * GroupSize / (FourBits ? 2 : 1);
  static constexpr int64_t kGroupBytes = kCodeBytes + kFixedPanel * 2 * (HasOffset ? 2 : 1);

  // Four bytes of each column: the codes of a quad.
  static __m512i codes(const uint8_t* group, int64_t quad) {
    if constexpr (!FourBits) return _mm512_loadu_si512(group + 64 * quad);
    const __m512i v = _mm512_loadu_si512(group + quad / 2 * 64);
    return _mm512_and_si512(quad % 2 ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
  }
  static __m256i steps(const uint8_t* group) { return _mm256_loadu_si256((const __m256i*)(group + kCodeBytes)); }
  // With the bias.
  static __m256i bases(const uint8_t* group, int min_q) {
    if constexpr (HasOffset) return _mm256_loadu_si256((const __m256i*)(group + kCodeBytes + 32));
    const __m256i bias = _mm256_set1_epi16(128);
    if constexpr (!FourBits) return bias;
    return _mm256_add_epi16(_mm256_mullo_epi16(steps(group), _mm256_set1_epi16(static_cast<int16_t>(min_q))), bias);
  }
};

// ---- inputs
// ----------------------------------------------------------------------------------------------------------

struct RowScale {
  float scale, inverse;
};

// NaN for a row that is not finite: whatever it is multiplied by.
RowScale scale_of(const float* x, int64_t features) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();  // magnitudes are ordered as their bits are, infinities and NaN above the rest
  for (int64_t k = 0; k < features; k += 16) {
    const __m512i v = _mm512_castps_si512(_mm512_maskz_loadu_ps(columns_mask(k, features), x + k));
    most = _mm512_max_epi32(most, _mm512_and_si512(v, magnitude));
  }
  const int32_t bits = _mm512_reduce_max_epi32(most);
  if (bits >= 0x7f800000) return {__builtin_nanf(""), 0.0f};
  const float top = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
  return top < 0x1p-100f ? RowScale{0.0f, 0.0f} : RowScale{top / kFixedTop, kFixedTop / top};
}

// 16 features as integers; none past the last.
inline __m512i round_inputs(const float* x, int64_t k, int64_t features, const RowScale& scale) {
  if (k >= features) return _mm512_setzero_si512();
  const __mmask16 lanes = columns_mask(k, features);
  const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + k), _mm512_set1_ps(scale.inverse));
  return _mm512_maskz_cvtps_epi32(lanes, scale.inverse == 0.0f ? _mm512_setzero_ps() : v);
}

// X = 256 * high + low: the digits as words, in the order of a quad's features 0, 2, 1, 3.
inline void split_words(__m512i x, uint8_t* high, uint8_t* low) {
  x = _mm512_shuffle_epi32(x, _MM_PERM_DBCA);
  const __m512i digit = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
  _mm256_storeu_si256((__m256i*)high, _mm512_cvtepi32_epi16(digit));
  _mm256_storeu_si256((__m256i*)low, _mm512_cvtepi32_epi16(_mm512_sub_epi32(x, _mm512_slli_epi32(digit, 8))));
}

// X = 256 * high + low, both signed bytes.
inline void split(__m512i x, uint8_t* high, uint8_t* low) {
  _mm_storeu_si128((__m128i*)low, _mm512_cvtepi32_epi8(x));
  const __m512i rest = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
  _mm_storeu_si128((__m128i*)high, _mm512_cvtepi32_epi8(rest));
}

// A block of features by their digits, as bytes: X = 256 * high + low; returns what adds up to the sum of X.
inline __m512i split_block(const float* x, int64_t k, int64_t features, const RowScale& scale, uint8_t* high,
                           uint8_t* low) {
  __m512i words[2], digits[2], rests[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    words[i] = _mm512_packs_epi32(round_inputs(x, k + 32 * i, features, scale),
                                  round_inputs(x, k + 32 * i + 16, features, scale));
    digits[i] = _mm512_srai_epi16(_mm512_add_epi16(words[i], _mm512_set1_epi16(128)), 8);
    rests[i] = _mm512_sub_epi16(words[i], _mm512_slli_epi16(digits[i], 8));
  }
  // Packing twice leaves four features of each vector in turn.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_store_si512(high, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(digits[0], digits[1])));
  _mm512_store_si512(low, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(rests[0], rests[1])));
  const __m512i ones = _mm512_set1_epi16(1);
  return _mm512_add_epi32(_mm512_madd_epi16(words[0], ones), _mm512_madd_epi16(words[1], ones));
}

// Row m of a tile.
void prepare_tile(const FixedInputs& inputs, const float* row, int64_t valid, const RowScale& scale, int64_t m,
                  uint8_t* bytes) {
  auto* sums = reinterpret_cast<int32_t*>(bytes + inputs.sums) + m;
  uint8_t* to = bytes + m / kTileRows * inputs.blocks * 2 * kTileBytes + m % kTileRows * 64;
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < inputs.blocks; ++i, to += 2 * kTileBytes) {
    sum = _mm512_add_epi32(sum, split_block(row, i * kFixedBlock, valid, scale, to, to + kTileBytes));
    if ((i + 1) % inputs.stretch_blocks == 0 || i + 1 == inputs.blocks) {
      sums[i / inputs.stretch_blocks * inputs.rows] = _mm512_reduce_add_epi32(sum);
      sum = _mm512_setzero_si512();
    }
  }
}

// Row m of few.
void prepare_few(const InputForm& form, const FixedInputs& inputs, const float* row, int64_t valid, int64_t features,
                 const RowScale& scale, int64_t m, uint8_t* bytes) {
  auto* sums = reinterpret_cast<int32_t*>(bytes + inputs.sums) + m;
  auto* group_sums = reinterpret_cast<int32_t*>(bytes + inputs.group_sums) + m;
  const int64_t step = inputs.stretch_blocks * kFixedBlock;
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < inputs.blocks * kFixedBlock; k += 32) {
    const __m512i a = round_inputs(row, k, valid, scale), b = round_inputs(row, k + 16, valid, scale);
    const __m512i both = _mm512_add_epi32(a, b);
    sum = _mm512_add_epi32(sum, both);
    if ((k + 32) % step == 0 || k + 32 == inputs.blocks * kFixedBlock) {
      sums[k / step * inputs.rows] = _mm512_reduce_add_epi32(sum);
      sum = _mm512_setzero_si512();
    }
    if (form.layout == kFixedWords) {
      uint8_t* to = bytes + (k / 32 * inputs.rows + m) * 128;
      split_words(a, to, to + 64);
      split_words(b, to + 32, to + 96);
    } else {
      uint8_t* to = bytes + (k / 32 * inputs.rows + m) * 64;
      split(a, to, to + 32);
      split(b, to + 16, to + 48);
      if (form.group == 32 && k < features) group_sums[k / 32 * inputs.rows] = _mm512_reduce_add_epi32(both);
      if (form.group == 16) {
        if (k < features) group_sums[k / 16 * inputs.rows] = _mm512_reduce_add_epi32(a);
        if (k + 16 < features) group_sums[(k / 16 + 1) * inputs.rows] = _mm512_reduce_add_epi32(b);
      }
    }
  }
}

// ---- results
// ---------------------------------------------------------------------------------------------------------

inline void put(float* y, __mmask16 mask, __m512 sum, __m512 units, float scale, bool add) {
  __m512 v = _mm512_mul_ps(_mm512_mul_ps(sum, units), _mm512_set1_ps(scale));
  if (add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), v);
  _mm512_mask_storeu_ps(y, mask, v);
}

// ---- few rows: what their kernels share
// ----------------------------------------------------------------------------------------------

// Where the weights of panels [n, n + 16 * Panels) are read, a group at a time, and where rows from m on have sums.
template <typename K, int Panels>
struct FewRows {
  const float* scales;
  const int32_t* sums;
  int64_t groups, step;  // of all features; of a stretch
  const uint8_t *units[Panels], *group[Panels];

  FewRows(const FixedWeights& w, const uint8_t* prepared, const FixedInputs& inputs, int64_t m, int64_t n)
      : scales(reinterpret_cast<const float*>(prepared + inputs.scales) + m),
        sums(reinterpret_cast<const int32_t*>(prepared + inputs.sums) + m),
        groups(w.in_features / K::kGroup),
        step(inputs.stretch_blocks * kFixedBlock / K::kGroup) {
    for (int i = 0; i < Panels; ++i) {
      units[i] = w.data + (n / kFixedPanel + i) * w.panel_bytes;
      group[i] = units[i] + kFixedPanel * sizeof(float);
    }
  }

  inline void prefetch() const {
    for (int i = 0; i < Panels; ++i) {
      for (int64_t at = 0; at < K::kGroupBytes; at += 64)
        _mm_prefetch((const char*)group[i] + kPrefetch + at, _MM_HINT_T0);
    }
  }

  inline void next_group() {
    for (int i = 0; i < Panels; ++i) group[i] += K::kGroupBytes;
  }

  // Row r's sum over a stretch, by panel i, to y, where the row begins.
  inline void put(float* y, int64_t n, int64_t column_end, int r, int i, __m512 sum, bool add) const {
    n += i * kFixedPanel;
    headrace::put(y + n, columns_mask(n, column_end), sum, _mm512_loadu_ps(units[i]), scales[r], add);
  }
};

// ---- few rows of 4-bit weights: codes times inputs, then times the group's step
// --------------------------------------

// Two panels share the broadcast of each input: the machine makes one a cycle, and two products.
template <typename K, int R, int Panels>
__attribute__((noinline)) void multiply_codes(const FixedWeights& w, const uint8_t* prepared, const FixedInputs& inputs,
                                              int64_t m, int64_t rows, float* y, int64_t ldy, int64_t n,
                                              int64_t column_end) {
  FewRows<K, Panels> few(w, prepared, inputs, m, n);
  const auto* group_sums = reinterpret_cast<const int32_t*>(prepared + inputs.group_sums) + m;
  for (int64_t first = 0, stretch = 0; first < few.groups; first += few.step, ++stretch) {
    // Sums of 64 bits: of even columns, of odd columns.
    __m512i even[R][Panels], odd[R][Panels];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < Panels; ++i) even[r][i] = odd[r][i] = _mm512_setzero_si512();
    }
    for (int64_t g = first; g < smaller(first + few.step, few.groups); ++g) {
      const uint8_t* x = prepared + (g * K::kGroup / 32 * inputs.rows + m) * 64 + g * K::kGroup % 32;
      few.prefetch();
      __m512i high[R][Panels], low[R][Panels];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < Panels; ++i) high[r][i] = low[r][i] = _mm512_setzero_si512();
      }
#pragma GCC unroll 8
      for (int64_t quad = 0; quad < K::kQuads; ++quad) {
        __m512i codes[Panels];
#pragma GCC unroll 2
        for (int i = 0; i < Panels; ++i) codes[i] = K::codes(few.group[i], quad);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const uint8_t* at = x + r * 64 + quad * kQuad;
          const __m512i x_high = broadcast_dword(at), x_low = broadcast_dword(at + 32);
#pragma GCC unroll 2
          for (int i = 0; i < Panels; ++i) {
            add_bytes(high[r][i], codes[i], x_high);
            add_bytes(low[r][i], codes[i], x_low);
          }
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < Panels; ++i) {
        const __m512i steps = _mm512_cvtepi16_epi32(K::steps(few.group[i]));
        const __m512i bases = _mm512_cvtepi16_epi32(K::bases(few.group[i], w.min_q));
        const __m512i odd_steps = _mm512_srli_epi64(steps, 32), odd_bases = _mm512_srli_epi64(bases, 32);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[r][i], 8), low[r][i]);
          const __m512i input = _mm512_set1_epi32(group_sums[g * inputs.rows + r]);
          const auto add = [](__m512i& to, __m512i a, __m512i b) { to = _mm512_add_epi64(to, _mm512_mul_epi32(a, b)); };
          add(even[r][i], steps, sum);
          add(odd[r][i], odd_steps, _mm512_srli_epi64(sum, 32));
          add(even[r][i], bases, input);
          add(odd[r][i], odd_bases, input);
        }
      }
      few.next_group();
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (r >= rows) continue;
      const __m512i bias = _mm512_set1_epi64(int64_t{128} * few.sums[stretch * inputs.rows + r]);
#pragma GCC unroll 2
      for (int i = 0; i < Panels; ++i) {
        const __m256 a = _mm512_cvtpd_ps(_mm512_cvtepi64_pd(_mm512_sub_epi64(even[r][i], bias)));
        const __m256 b = _mm512_cvtpd_ps(_mm512_cvtepi64_pd(_mm512_sub_epi64(odd[r][i], bias)));
        const __m512 order =
            _mm512_castsi512_ps(_mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
        const __m512 sum =
            _mm512_permutex2var_ps(_mm512_castps256_ps512(a), _mm512_castps_si512(order), _mm512_castps256_ps512(b));
        few.put(y + r * ldy, n, column_end, r, i, sum, stretch > 0);
      }
    }
  }
}

// ---- few rows of 8-bit weights: weights by digits of inputs
// ------------------------------------------------------------

// W + 128 of one group's quads: features 0 and 2, and 1 and 3, of every column.
template <typename K>
struct Weights {
  __m512i steps, bases;  // of a group, twice in each column's 32 bits

  Weights(const uint8_t* group, int min_q) : steps(twice(K::steps(group))), bases(twice(K::bases(group, min_q))) {}

  static __m512i twice(__m256i v) {
    const __m512i wide = _mm512_cvtepu16_epi32(v);
    return _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
  }

  inline void of(__m512i codes, __m512i& first, __m512i& second) const {
    const __m512i upper = _mm512_set1_epi16(static_cast<int16_t>(0xff00));
    if constexpr (K::kFourBits) {
      first = _mm512_mullo_epi16(_mm512_andnot_si512(upper, codes), steps);
      second = _mm512_mullo_epi16(_mm512_srli_epi16(codes, 8), steps);
    } else {
      first = _mm512_mulhrs_epi16(_mm512_slli_epi16(codes, 8), steps);
      second = _mm512_mulhrs_epi16(_mm512_and_si512(codes, upper), steps);
    }
    first = _mm512_add_epi16(first, bases);
    second = _mm512_add_epi16(second, bases);
  }
};

// The high bytes of a quad's features 0 and 2, and 1 and 3, in their order.
inline __m512i high_bytes(__m512i first, __m512i second) {
  const __m512i upper = _mm512_set1_epi16(static_cast<int16_t>(0xff00));
  return _mm512_ternarylogic_epi32(upper, second, _mm512_srli_epi16(first, 8), 0xca);  // upper ? second : first
}

// Likewise the low ones.
inline __m512i low_bytes(__m512i first, __m512i second) {
  const __m512i upper = _mm512_set1_epi16(static_cast<int16_t>(0xff00));
  return _mm512_ternarylogic_epi32(upper, _mm512_slli_epi16(second, 8), first, 0xca);
}

template <typename K, int R, int Panels>
__attribute__((noinline)) void multiply_words(const FixedWeights& w, const uint8_t* prepared, const FixedInputs& inputs,
                                              int64_t m, int64_t rows, float* y, int64_t ldy, int64_t n,
                                              int64_t column_end) {
  FewRows<K, Panels> few(w, prepared, inputs, m, n);
  for (int64_t first = 0, stretch = 0; first < few.groups; first += few.step, ++stretch) {
    // [rows][panels][halves of a quad]: apart, 288 products of 22 bits fit
    __m512i high[R][Panels][2], low[R][Panels][2];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < Panels; ++i)
        high[r][i][0] = high[r][i][1] = low[r][i][0] = low[r][i][1] = _mm512_setzero_si512();
    }
    for (int64_t g = first; g < smaller(first + few.step, few.groups); ++g) {
      const uint8_t* x = prepared + (g * K::kGroup / 32 * inputs.rows + m) * 128 + g * K::kGroup % 32 * 2;
      few.prefetch();
      const Weights<K> weights[2] = {{few.group[0], w.min_q}, {few.group[Panels - 1], w.min_q}};
#pragma GCC unroll 8
      for (int64_t quad = 0; quad < K::kQuads; ++quad) {
        __m512i pairs[Panels][2];
#pragma GCC unroll 2
        for (int i = 0; i < Panels; ++i) weights[i].of(K::codes(few.group[i], quad), pairs[i][0], pairs[i][1]);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          const uint8_t* at = x + r * 128 + quad * 8;
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m512i x_high = broadcast_dword(at + 4 * h), x_low = broadcast_dword(at + 64 + 4 * h);
#pragma GCC unroll 2
            for (int i = 0; i < Panels; ++i) {
              add_words(high[r][i][h], pairs[i][h], x_high);
              add_words(low[r][i][h], pairs[i][h], x_low);
            }
          }
        }
      }
      few.next_group();
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      if (r >= rows) continue;
      const __m512d bias = _mm512_set1_pd(128.0 * few.sums[stretch * inputs.rows + r]);
#pragma GCC unroll 2
      for (int i = 0; i < Panels; ++i) {
        const auto half = [&](int upper) {
          const auto wide = [&](const __m512i(&v)[2]) {
            const auto part = [&](__m512i a) {
              return _mm512_cvtepi32_pd(upper ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a));
            };
            return _mm512_add_pd(part(v[0]), part(v[1]));
          };
          const __m512d sum = _mm512_fmadd_pd(wide(high[r][i]), _mm512_set1_pd(256), wide(low[r][i]));
          return _mm512_cvtpd_ps(_mm512_sub_pd(sum, bias));
        };
        const __m512 sum = _mm512_insertf32x8(_mm512_castps256_ps512(half(0)), half(1), 1);
        few.put(y + r * ldy, n, column_end, r, i, sum, stretch > 0);
      }
    }
  }
}

// ---- few rows of weights of one digit
// -----------------------------------------------------------------------------------------------

// W + 128 of a group's quads, as bytes.
template <typename K>
struct Digits {
  Weights<K> weights;

  Digits(const uint8_t* group, int min_q) : weights(group, min_q) {
    weights.bases = _mm512_xor_si512(weights.bases, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
  }

  inline __m512i of(const uint8_t* group, int64_t quad) const {
    __m512i first, second;
    weights.of(K::codes(group, quad), first, second);
    return high_bytes(first, second);
  }
};

// Stored as they are read, a run of 32 features taken for a group.
struct Bytes {
  static constexpr bool kFourBits = false, kTiles = true;
  static constexpr int kGroup = 32, kQuads = kGroup / 4;
  static constexpr int64_t kGroupBytes = kFixedPanel * kGroup;
};

template <>
struct Digits<Bytes> {
  Digits(const uint8_t*, int) {}
  inline __m512i of(const uint8_t* group, int64_t quad) const { return _mm512_load_si512(group + 64 * quad); }
};

// The sum of W * X over a stretch from that of (W + 128) * X by digits of X, and from that of X: rounded once, since
// f32 holds what is a multiple of 256 and what is not.
inline __m512 one_digit_sum(__m512i high, __m512i low, int32_t inputs) {
  static_assert(Stretches::kMostBlocks * kFixedBlock * 128 * 128 < 1 << 24);
  low = _mm512_sub_epi32(low, _mm512_set1_epi32(128 * (inputs & 1)));
  high = _mm512_add_epi32(_mm512_sub_epi32(high, _mm512_set1_epi32(inputs >> 1)), _mm512_srai_epi32(low, 8));
  low = _mm512_and_si512(low, _mm512_set1_epi32(255));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
}

template <typename K, int R, int Panels>
__attribute__((noinline)) void multiply_digits(const FixedWeights& w, const uint8_t* prepared,
                                               const FixedInputs& inputs, int64_t m, int64_t rows, float* y,
                                               int64_t ldy, int64_t n, int64_t column_end) {
  FewRows<K, Panels> few(w, prepared, inputs, m, n);
  for (int64_t first = 0, stretch = 0; first < few.groups; first += few.step, ++stretch) {
    __m512i high[R][Panels], low[R][Panels];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < Panels; ++i) high[r][i] = low[r][i] = _mm512_setzero_si512();
    }
    for (int64_t g = first; g < smaller(first + few.step, few.groups); ++g) {
      const uint8_t* x = prepared + (g * K::kGroup / 32 * inputs.rows + m) * 64 + g * K::kGroup % 32;
      few.prefetch();
      const Digits<K> digits[2] = {{few.group[0], w.min_q}, {few.group[Panels - 1], w.min_q}};
#pragma GCC unroll 8
      for (int64_t quad = 0; quad < K::kQuads; ++quad) {
        __m512i weights[Panels];
#pragma GCC unroll 2
        for (int i = 0; i < Panels; ++i) weights[i] = digits[i].of(few.group[i], quad);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const uint8_t* at = x + r * 64 + quad * kQuad;
          const __m512i x_high = broadcast_dword(at), x_low = broadcast_dword(at + 32);
#pragma GCC unroll 2
          for (int i = 0; i < Panels; ++i) {
            add_bytes(high[r][i], weights[i], x_high);
            add_bytes(low[r][i], weights[i], x_low);
          }
        }
      }
      few.next_group();
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (r >= rows) continue;
#pragma GCC unroll 2
      for (int i = 0; i < Panels; ++i) {
        const __m512 sum = one_digit_sum(high[r][i], low[r][i], few.sums[stretch * inputs.rows + r]);
        few.put(y + r * ldy, n, column_end, r, i, sum, stretch > 0);
      }
    }
  }
}

template <typename K, bool OneDigit, int R, int Panels>
void multiply_few(const FixedWeights& w, const uint8_t* prepared, const FixedInputs& inputs, int64_t rows, float* y,
                  int64_t ldy, int64_t n, int64_t column_end) {
  for (int64_t m = 0; m < rows; m += R) {  // the second time, weights come from L1
    if constexpr (OneDigit) {
      multiply_digits<K, R, Panels>(w, prepared, inputs, m, rows - m, y + m * ldy, ldy, n, column_end);
    } else if constexpr (K::kFourBits) {
      multiply_codes<K, R, Panels>(w, prepared, inputs, m, rows - m, y + m * ldy, ldy, n, column_end);
    } else {
      multiply_words<K, R, Panels>(w, prepared, inputs, m, rows - m, y + m * ldy, ldy, n, column_end);
    }
  }
}

template <typename K, bool OneDigit, int R>
void run_few_rows(const FixedWeights& w, const uint8_t* prepared, const FixedInputs& inputs, int64_t rows, float* y,
                  int64_t ldy, int64_t column_begin, int64_t column_end) {
  int64_t n = column_begin;
  for (; n + kFixedPanel < column_end; n += 2 * kFixedPanel)
    multiply_few<K, OneDigit, R, 2>(w, prepared, inputs, rows, y, ldy, n, column_end);
  if (n < column_end) multiply_few<K, OneDigit, R, 1>(w, prepared, inputs, rows, y, ldy, n, column_end);
}

// ---- more rows: a stretch of a panel is turned to digits once and multiplied by every tile of rows
// ----------------------

// Tile registers: 0 to 3 sum products of digits, inputs first. Of two digits of weights: high * high, low * high,
// high * low, low * low, 4 and 5 hold the weights' high and low digits. Of one: the same of two panels, which 4 and 5
// hold. 6 and 7 hold the inputs' high and low digits.
void configure(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 4; ++tile) config.set(tile, rows, 64);
  for (int tile = 4; tile < 6; ++tile) config.set(tile, kTileRows, 64);
  for (int tile = 6; tile < 8; ++tile) config.set(tile, rows, 64);
  config.load();
}

// The sum of W * X over a stretch from those of digits by digits, W + 128 = 256 * high + low, and from that of X.
inline __m512 two_digit_sum(__m512i high, __m512i middle, __m512i low, int32_t inputs) {
  const __m512i bytes = _mm512_set1_epi32(255), words = _mm512_set1_epi32(65535);
  // As 65536 * top + rest, of which f32 holds both: |top| < 2^24, rest < 2^16.
  static_assert(Stretches::kMostBlocks * kFixedBlock * 128 * 128 < 1 << 24);
  __m512i rest = _mm512_slli_epi32(_mm512_and_si512(middle, bytes), 8);
  rest = _mm512_sub_epi32(_mm512_add_epi32(rest, low), _mm512_set1_epi32(128 * (inputs & 511)));
  __m512i top = _mm512_add_epi32(high, _mm512_srai_epi32(middle, 8));
  top = _mm512_sub_epi32(top, _mm512_set1_epi32(inputs >> 9));
  top = _mm512_add_epi32(top, _mm512_srai_epi32(rest, 16));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(top), _mm512_set1_ps(65536.0f),
                         _mm512_cvtepi32_ps(_mm512_and_si512(rest, words)));
}

// Sums of a row tile on their way to y: a row at a time, between the products of the next.
template <bool OneDigit>
struct Results {
  alignas(64) int32_t sums[4][kTileRows * kFixedPanel];
  const float *units[2] = {}, *scales = nullptr;  // of panels, of rows
  const int32_t* inputs = nullptr;
  float* y = nullptr;
  int64_t ldy = 0, rows = 0, next = 0;
  __mmask16 masks[2] = {};
  bool add = false;

  inline void write_row() {
    if (next >= rows) return;
    const int64_t r = next++;
    const auto load = [&](int i) { return _mm512_load_si512(sums[i] + r * kFixedPanel); };
    float* to = y + r * ldy;
    if constexpr (OneDigit) {
      put(to, masks[0], one_digit_sum(load(0), load(1), inputs[r]), _mm512_loadu_ps(units[0]), scales[r], add);
      put(to + kFixedPanel, masks[1], one_digit_sum(load(2), load(3), inputs[r]), _mm512_loadu_ps(units[1]), scales[r],
          add);
    } else {
      const __m512 sum = two_digit_sum(load(0), _mm512_add_epi32(load(1), load(2)), load(3), inputs[r]);
      put(to, masks[0], sum, _mm512_loadu_ps(units[0]), scales[r], add);
    }
  }

  void finish() {
    while (next < rows) write_row();
  }
};

// Weights as tiles of 64 features: of two digits the high ones, then the low ones; of one digit those of two panels.
struct WeightTiles {
  const uint8_t *first, *second;
  int64_t step;  // bytes from one to the next
};

// Groups [begin, end) of a panel as tiles.
template <typename K, bool OneDigit>
void decode(const FixedWeights& w, int64_t panel, int64_t begin, int64_t end, uint8_t* to) {
  constexpr int64_t kStep = (OneDigit ? 1 : 2) * kTileBytes;
  const uint8_t* from = w.data + panel * w.panel_bytes + kFixedPanel * sizeof(float) + begin * K::kGroupBytes;
  for (int64_t k = 0; k < (end - begin) * K::kGroup; k += K::kGroup, from += K::kGroupBytes) {
    uint8_t* tile = to + k / kFixedBlock * kStep + k % kFixedBlock * 16;
    for (int64_t at = 0; at < K::kGroupBytes; at += 64)
      _mm_prefetch((const char*)from + kFarPrefetch + at, _MM_HINT_T0);
    if constexpr (OneDigit) {
      const Digits<K> digits(from, w.min_q);
#pragma GCC unroll 8
      for (int64_t quad = 0; quad < K::kQuads; ++quad) _mm512_store_si512(tile + quad * 64, digits.of(from, quad));
    } else {
      const Weights<K> weights(from, w.min_q);
#pragma GCC unroll 8
      for (int64_t quad = 0; quad < K::kQuads; ++quad) {
        __m512i first, second;
        weights.of(K::codes(from, quad), first, second);
        _mm512_store_si512(tile + quad * 64, high_bytes(first, second));
        _mm512_store_si512(tile + kTileBytes + quad * 64, low_bytes(first, second));
      }
    }
  }
}

// Asks for a cache line that will be written.
inline void prefetch_to_write(const void* p) { asm volatile("prefetchw %0" ::"m"(*static_cast<const char*>(p))); }

// By the weights in tile 4: high digits are signed, W + 128 is not.
template <bool OneDigit, int C, int A>
inline void multiply_first() {
  if constexpr (OneDigit) {
    tile_multiply_unsigned<C, A, 4>();
  } else {
    tile_multiply_bytes<C, A, 4>();
  }
}

// Chains of one row tile: 64 features of inputs by weights at a time. `to`: where in y their sums will go, rows of ldy.
template <bool OneDigit>
inline __attribute__((always_inline)) void multiply_blocks(const uint8_t* x, WeightTiles weights, int64_t blocks,
                                                           const float* to, int64_t ldy, int64_t rows,
                                                           Results<OneDigit>& results) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t i = 0; i < blocks; ++i, x += 2 * kTileBytes) {
    tile_load<4>(weights.first + i * weights.step, 64);
    tile_load<6>(x, 64);
    multiply_first<OneDigit, 0, 6>();
    tile_load<7>(x + kTileBytes, 64);
    multiply_first<OneDigit, 1, 7>();
    tile_load<5>(weights.second + i * weights.step, 64);
    tile_multiply_unsigned<2, 6, 5>();
    tile_multiply_unsigned<3, 7, 5>();
    if (2 * i < rows) {
      prefetch_to_write(to);
      prefetch_to_write(to + ldy);
      if constexpr (OneDigit) {
        prefetch_to_write(to + kFixedPanel);
        prefetch_to_write(to + ldy + kFixedPanel);
      }
      to += 2 * ldy;
    }
    results.write_row();
    results.write_row();
  }
  results.finish();
}

// The tiles of blocks [first, first + count) of panels `panel` and, of one digit, `second`: where weights are stored as
// such, there; else in `decoded`.
template <typename K, bool OneDigit>
WeightTiles weight_tiles(const FixedWeights& w, int64_t panel, int64_t second, int64_t first, int64_t count,
                         uint8_t* decoded) {
  if constexpr (K::kTiles) {
    const uint8_t* at = w.data + kFixedPanel * sizeof(float) + first * kTileBytes;
    return {at + panel * w.panel_bytes, at + second * w.panel_bytes, kTileBytes};
  } else {
    constexpr int64_t kGroups = kFixedBlock / K::kGroup;
    const int64_t begin = first * kGroups, end = smaller((first + count) * kGroups, w.in_features / K::kGroup);
    decode<K, OneDigit>(w, panel, begin, end, decoded);
    if constexpr (!OneDigit) return {decoded, decoded + kTileBytes, 2 * kTileBytes};
    uint8_t* behind = decoded + Stretches::kMostBlocks * kTileBytes;
    decode<K, OneDigit>(w, second, begin, end, behind);
    return {decoded, behind, kTileBytes};
  }
}

template <typename K, bool OneDigit>
__attribute__((noinline)) void run_many_rows(const FixedWeights& w, const uint8_t* prepared, const FixedInputs& inputs,
                                             int64_t rows, float* y, int64_t ldy, int64_t column_begin,
                                             int64_t column_end) {
  constexpr int64_t kColumns = (OneDigit ? 2 : 1) * kFixedPanel;
  const int64_t fitting = kInputBytes / (inputs.blocks * 2 * kTileBytes) * kTileRows;
  const int64_t chunk = fitting < kTileRows ? kTileRows : fitting;
  alignas(64) uint8_t decoded[Stretches::kMostBlocks * 2 * kTileBytes];
  // The last block may end early: what lies behind meets inputs of zero.
  if (w.in_features % kFixedBlock != 0) __builtin_memset(decoded, 0, sizeof decoded);
  Results<OneDigit> results;
  configure(smaller(rows, kTileRows));
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t chunk_end = smaller(begin + chunk, rows);
    for (int64_t n = column_begin; n < column_end; n += kColumns) {
      const bool pair = OneDigit && n + kFixedPanel < column_end;
      const int64_t panel = n / kFixedPanel, second = pair ? panel + 1 : panel;
      for (int64_t stretch = 0, first = 0; first < inputs.blocks; ++stretch, first += inputs.stretch_blocks) {
        const int64_t count = smaller(inputs.stretch_blocks, inputs.blocks - first);
        const WeightTiles weights = weight_tiles<K, OneDigit>(w, panel, second, first, count, decoded);
        for (int64_t m = begin; m < chunk_end; m += kTileRows) {
          float* to = y + m * ldy + n;
          const int64_t tile_rows = smaller(kTileRows, rows - m);
          multiply_blocks(prepared + (m / kTileRows * inputs.blocks + first) * 2 * kTileBytes, weights, count, to, ldy,
                          tile_rows, results);
          tile_store<0>(results.sums[0], 64);
          tile_store<1>(results.sums[1], 64);
          tile_store<2>(results.sums[2], 64);
          tile_store<3>(results.sums[3], 64);
          results.units[0] = reinterpret_cast<const float*>(w.data + panel * w.panel_bytes);
          results.units[1] = reinterpret_cast<const float*>(w.data + second * w.panel_bytes);
          results.scales = reinterpret_cast<const float*>(prepared + inputs.scales) + m;
          results.inputs = reinterpret_cast<const int32_t*>(prepared + inputs.sums) + stretch * inputs.rows + m;
          results.y = to;
          results.ldy = ldy;
          results.rows = tile_rows;
          results.next = 0;
          results.masks[0] = columns_mask(n, column_end);
          results.masks[1] = pair ? columns_mask(n + kFixedPanel, column_end) : __mmask16{0};
          results.add = stretch > 0;
        }
      }
    }
  }
  results.finish();
  release_tiles();
}

}  // namespace

void fixed_prepare(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features, void* prepared,
                   int64_t row_begin, int64_t row_end) {
  const FixedInputs inputs(form, rows, features);
  auto* bytes = static_cast<uint8_t*>(prepared);
  auto* scales = reinterpret_cast<float*>(bytes + inputs.scales);
  const int64_t end = row_end == rows ? inputs.rows : row_end;  // rows that pad are zeros
  for (int64_t m = row_begin; m < end; ++m) {
    const float* row = x + m * ldx;
    const int64_t valid = m < rows ? features : 0;
    const RowScale scale = scale_of(row, valid);
    scales[m] = scale.scale;
    if (inputs.few) {
      prepare_few(form, inputs, row, valid, features, scale, m, bytes);
    } else {
      prepare_tile(inputs, row, valid, scale, m, bytes);
    }
  }
}

void fixed_run(const FixedWeights& w, const InputForm& form, const void* prepared, int64_t rows, float* y, int64_t ldy,
               int64_t column_begin, int64_t column_end) {
  const FixedInputs inputs(form, rows, w.in_features);
  const auto* bytes = static_cast<const uint8_t*>(prepared);
  const auto run_as = [&]<typename K, bool OneDigit>() {
    constexpr int kRows = OneDigit || K::kFourBits ? 4 : 2;
    const auto kernel = !inputs.few        ? run_many_rows<K, OneDigit>
                        : inputs.rows == 1 ? run_few_rows<K, OneDigit, 1>
                        : inputs.rows == 2 ? run_few_rows<K, OneDigit, 2>
                                           : run_few_rows<K, OneDigit, kRows>;
    kernel(w, bytes, inputs, rows, y, ldy, column_begin, column_end);
  };
  if (w.stores_digits()) return run_as.template operator()<Bytes, true>();
  const auto run = [&]<typename K>(K) {
    if constexpr (K::kFourBits) {
      if (w.one_digit) return run_as.template operator()<K, true>();
    }
    run_as.template operator()<K, false>();
  };
  if (w.four_bits) {
    if (w.group == 32) return w.has_offset ? run(Kind<true, 32, true>()) : run(Kind<true, 32, false>());
    return w.has_offset ? run(Kind<true, 16, true>()) : run(Kind<true, 16, false>());
  }
  if (w.group == 16) return run(Kind<false, 16, false>());
  return w.has_offset ? run(Kind<false, 32, true>()) : run(Kind<false, 32, false>());
}

}  // namespace headrace
