// The integer kernels on AVX2, two vectors to a panel's sixteen columns. Inputs of 16 bits multiply codes as words
// (vpmaddwd). Inputs of 8 bits multiply codes of up to 6 bits as bytes (vpmaddubsw), which adds pairs of products in 16
// bits and so limits how many may follow before they are widened; codes of 8 bits would overflow it: words, again.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "linear_int.h"

namespace headrace {
namespace {

using Payload = IntWeights::Payload;

constexpr int64_t kLanes = 8;
constexpr int kHalves = 2;                 // of a panel
constexpr int kBlockRows = 4;              // of sums that stay in registers
constexpr int64_t kChunkBytes = 16 << 10;  // bytes of unpacked weights that share L1 with the inputs

// ---- inputs ---------------------------------------------------------------------------------------------------------

inline int32_t reduce_add(__m256i x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

inline int32_t reduce_max(__m256i x) {
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

// Largest magnitude of a group, as bits: for these NaN is larger than infinity, and infinity than all else.
template <int Group>
inline float largest(const float* x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < Group; i += kLanes) {
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(x + i)), mask));
  }
  const int32_t bits = reduce_max(most);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// One group of one row in fixed point: q, and what goes with it, as on AVX-512.
template <int Group>
inline IntGroup to_integers(const float* x, Activation activation, int32_t min_q, __m256i* q) {
  const float top = activation == Activation::int8 ? kTopInt8 : kTopInt16;
  const float most = largest<Group>(x);
  const bool empty = most < 0x1p-100f;
  const __m256 inverse = _mm256_set1_ps(empty ? 0.0f : top / most);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < Group / kLanes; ++i) {
    q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i * kLanes), inverse));
    sum = _mm256_add_epi32(sum, q[i]);
  }
  const int32_t total = reduce_add(sum);
  const float scale = empty ? 0.0f : std::isfinite(most) ? most / top : NAN;
  return {scale, static_cast<float>(total) * scale, 0, min_q * total};
}

// The low halves of sixteen integers, in order.
inline __m256i low_words(__m256i a, __m256i b) {
  const __m256i mask = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

template <int Group>
void prepare_rows(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features, uint8_t* out,
                  int64_t row_begin, int64_t row_end) {
  const bool wide = reads_words(form);
  auto* groups = reinterpret_cast<IntGroup*>(out + rows * features * (wide ? 2 : 1));
  for (int64_t r = row_begin; r < row_end; ++r) {
    for (int64_t g = 0; g < features / Group; ++g) {
      __m256i q[Group / kLanes];
      groups[r * (features / Group) + g] = to_integers<Group>(x + r * ldx + g * Group, form.activation, form.layout, q);
      for (int i = 0; i < Group / kLanes; i += 2) {
        const int64_t at = r * features + g * Group + i * kLanes;
        if (wide) {
          const __m256i a = _mm256_shuffle_epi32(q[i], 0xd8), b = _mm256_shuffle_epi32(q[i + 1], 0xd8);
          _mm256_storeu_si256((__m256i*)(out + 2 * at), low_words(a, b));
        } else {
          const __m256i words = _mm256_and_si256(low_words(q[i], q[i + 1]), _mm256_set1_epi16(0xff));
          const __m128i high = _mm256_extracti128_si256(words, 1);
          _mm_storeu_si128((__m128i*)(out + at), _mm_packus_epi16(_mm256_castsi256_si128(words), high));
        }
      }
    }
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------

// How products are summed: of words; or of bytes, in runs whose sums fit 16 bits.
//   bytes   codes below 16: eight quads sum up to 8 * 2 * 15 * 127
//   pairs   codes below 64: two quads, up to 2 * 2 * 63 * 127
enum class Products : uint8_t { words, bytes, pairs };

template <Products P, int Group_, bool Offset_>
struct Shape {
  static constexpr Products kProducts = P;
  static constexpr int Group = Group_;
  static constexpr bool Offset = Offset_;
  static constexpr int kQuads = Group / kQuad;
  static constexpr int kVectors = P == Products::words ? 2 * kQuads : kQuads;  // of codes, of each half of the panel
  static constexpr int kRun = P == Products::pairs ? 2 : kQuads;               // of those, summed in 16 bits
  static constexpr int64_t kInputBytes = Group * (P == Products::words ? 2 : 1);
};

inline __m256 load_f16_scales(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline __m256 load_bf16_scales(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline __m256 load_multiples(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

// A panel as packed, one group after the other.
template <typename L, Products P>
class Packed : public Shape<P, L::Group, L::Offset> {
 public:
  explicit Packed(const uint8_t* block) : at_(block) {}

  // Go to group g: call with 0, 1, 2, ... of the first block.
  void enter(int64_t g) {
    if (g > 0) at_ += L::kGroupBytes;
    if (g % L::kBlockGroups == 0) read_header();
    ask_far<L::kGroupBytes>(at_);
    ask_near<L::kGroupBytes>(at_);
  }

  // Vector i: of words, (k0, k2) or (k1, k3) of each column's quad i / 2; of bytes, quad i.
  __m256i codes(int i, int half) const {
    if constexpr (P != Products::words) return bytes(i, half);
    if constexpr (L::kPayload == Payload::u4) {
      const __m256i two_quads = load(i / 4 * 64, half);
      return _mm256_and_si256(_mm256_srli_epi16(two_quads, i / 2 % 2 * 4 + i % 2 * 8), _mm256_set1_epi16(15));
    }
    const __m256i quad = bytes(i / 2, half);
    return i % 2 ? _mm256_srli_epi16(quad, 8) : _mm256_and_si256(quad, _mm256_set1_epi16(0xff));
  }

  // As `decode_quants` computes them, bit for bit.
  __m256 scale(int half) const {
    const uint8_t* p = at_ + L::kCodeBytes + half * (L::kScaleBytes / kHalves);
    if constexpr (L::Scales == ScaleType::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    if constexpr (L::Scales == ScaleType::bf16) return load_bf16_scales(p);
    if constexpr (!L::TwoLevels) return load_f16_scales(p);
    return _mm256_mul_ps(d_[half], load_multiples(p));
  }
  __m256 offset(int half) const {
    const uint8_t* p = at_ + L::kCodeBytes + L::kScaleBytes + half * (L::kOffsetBytes / kHalves);
    if constexpr (L::ZeroPoints) {
      return _mm256_mul_ps(scale(half), _mm256_sub_ps(_mm256_setzero_ps(), load_multiples(p)));
    }
    if constexpr (!L::TwoLevels) return load_f16_scales(p);
    return _mm256_mul_ps(negative_dmin_[half], load_multiples(p));
  }

 private:
  void read_header() {
    if constexpr (!L::TwoLevels) return;
    for (int half = 0; half < kHalves; ++half) {
      d_[half] = load_f16_scales(at_ + 16 * half);
      if (L::Offset) {
        negative_dmin_[half] = _mm256_sub_ps(_mm256_setzero_ps(), load_f16_scales(at_ + 32 + 16 * half));
      }
    }
    at_ += L::kHeaderBytes;
  }

  __m256i load(int64_t offset, int half) const {
    return _mm256_loadu_si256((const __m256i*)(at_ + offset + 32 * half));
  }

  // The codes of one quad, four bytes of each column.
  __m256i bytes(int quad, int half) const {
    if constexpr (L::kPayload == Payload::u8) return load(64 * quad, half);
    __m256i v = load(quad / 2 * 64, half);
    if (quad % 2) v = _mm256_srli_epi16(v, 4);
    v = _mm256_and_si256(v, _mm256_set1_epi8(15));
    if constexpr (L::kPayload == Payload::u4) return v;
    __m256i h = load(L::Group * 8 + quad / 4 * 64, half);
    if (quad % 4 < 2) h = _mm256_slli_epi16(h, 4 - quad % 4 * 2);
    if (quad % 4 == 3) h = _mm256_srli_epi16(h, 2);
    return _mm256_or_si256(v, _mm256_and_si256(h, _mm256_set1_epi8(0x30)));
  }

  const uint8_t* at_;
  __m256 d_[kHalves], negative_dmin_[kHalves];
};

// Groups of a panel, unpacked once for all rows.
template <typename S>
struct Chunk {
  static constexpr int64_t kGroups = kChunkBytes / (S::kVectors * kHalves * sizeof(__m256i));
  __m256i codes[kGroups][S::kVectors][kHalves];
  __m256 scales[kGroups][kHalves], offsets[kGroups][kHalves];

  template <typename Source>
  void fill(Source& from, int64_t group, int64_t count) {
    for (int64_t g = 0; g < count; ++g) {
      from.enter(group + g);
      for (int half = 0; half < kHalves; ++half) {
#pragma GCC unroll 16
        for (int i = 0; i < S::kVectors; ++i) codes[g][i][half] = from.codes(i, half);
        scales[g][half] = from.scale(half);
        if (S::Offset) offsets[g][half] = from.offset(half);
      }
    }
  }
};

template <typename S_>
class Unpacked : public S_ {
 public:
  using S = S_;

  explicit Unpacked(const Chunk<S>& chunk) : chunk_(chunk) {}
  void enter(int64_t g) { group_ = g; }
  __m256i codes(int i, int half) const { return chunk_.codes[group_][i][half]; }
  __m256 scale(int half) const { return chunk_.scales[group_][half]; }
  __m256 offset(int half) const { return chunk_.offsets[group_][half]; }

 private:
  const Chunk<S>& chunk_;
  int64_t group_ = 0;
};

// ---- products -------------------------------------------------------------------------------------------------------

struct Inputs {
  const uint8_t* values;   // of the first row and feature
  const IntGroup* groups;  // likewise
  int64_t ld, ld_groups;   // bytes, groups

  __m256i quad(int64_t row, int64_t at) const {  // or half a quad of words
    int32_t value;
    std::memcpy(&value, values + row * ld + at, sizeof value);
    return _mm256_set1_epi32(value);
  }
  const IntGroup& group(int64_t row) const { return groups[row * ld_groups]; }
};

// Sums stay chains: left alone, GCC makes trees of integer additions, whose leaves are more than there are registers.
inline __m256i chain(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

template <typename Weights, int R>
inline void sum_words(const Weights& w, const Inputs& x, __m256i (&sum)[R][kHalves]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_set1_epi32(x.group(r).bias_lo);
#pragma GCC unroll 16
  for (int i = 0; i < Weights::kVectors; ++i) {
    const __m256i c[kHalves] = {w.codes(i, 0), w.codes(i, 1)};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i v = x.quad(r, 4 * i);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) sum[r][h] = chain(_mm256_add_epi32(sum[r][h], _mm256_madd_epi16(c[h], v)));
    }
  }
}

// Two vectors at a time, so that few registers hold both kinds of sums.
template <typename Weights, int R>
inline void sum_bytes(const Weights& w, const Inputs& x, __m256i (&sum)[R][kHalves]) {
  constexpr int kRun = Weights::kRun;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i part[R][kHalves];
#pragma GCC unroll 8
  for (int i = 0; i < Weights::kVectors; i += 2) {
    const bool begins = i % kRun == 0, ends = (i + 2) % kRun == 0;
    const __m256i c[kHalves] = {w.codes(i, 0), w.codes(i, 1)}, d[kHalves] = {w.codes(i + 1, 0), w.codes(i + 1, 1)};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i v = x.quad(r, 4 * i), u = x.quad(r, 4 * i + 4);
      if (i == 0) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        const __m256i two = _mm256_add_epi16(_mm256_maddubs_epi16(c[h], v), _mm256_maddubs_epi16(d[h], u));
        part[r][h] = chain(begins ? two : _mm256_add_epi16(part[r][h], two));
        if (ends) sum[r][h] = chain(_mm256_add_epi32(sum[r][h], _mm256_madd_epi16(part[r][h], ones)));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m256i bias = _mm256_set1_epi32(x.group(r).bias_lo);
    sum[r][0] = _mm256_add_epi32(sum[r][0], bias);
    sum[r][1] = _mm256_add_epi32(sum[r][1], bias);
  }
}

// y, the first of `columns` that exist (at most 16).
inline __m256i half_mask(int64_t columns, int half) {
  const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(half * kLanes));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(columns)), lane);
}
inline __m256 load_half(const float* y, int64_t columns, int half) {
  if (columns >= kIntPanel) return _mm256_loadu_ps(y + half * kLanes);
  return _mm256_maskload_ps(y + half * kLanes, half_mask(columns, half));
}
inline void store_half(float* y, int64_t columns, int half, __m256 value) {
  if (columns >= kIntPanel) {
    _mm256_storeu_ps(y + half * kLanes, value);
  } else {
    _mm256_maskstore_ps(y + half * kLanes, half_mask(columns, half), value);
  }
}

struct Output {
  float* y;  // of the first row and column
  int64_t ld, columns;
  bool first;  // y holds nothing yet
};

// R rows times `count` groups of a panel.
template <typename Weights, int R>
[[gnu::noinline]] void multiply(Weights w, int64_t count, Inputs x, const Output& out) {
  __m256 acc[R][kHalves];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h)
      acc[r][h] = out.first ? _mm256_setzero_ps() : load_half(out.y + r * out.ld, out.columns, h);
  }
  for (int64_t g = 0; g < count; ++g, x.values += Weights::kInputBytes, ++x.groups) {
    w.enter(g);
    __m256i sum[R][kHalves];
    if constexpr (Weights::kProducts == Products::words) {
      sum_words<Weights, R>(w, x, sum);
    } else {
      sum_bytes<Weights, R>(w, x, sum);
    }
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
      const __m256 scale = w.scale(h), offset = Weights::Offset ? w.offset(h) : scale;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        // One link of the chain of linear_int.h.
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x.group(r).scale));
        acc[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][h]), both, acc[r][h]);
        if (Weights::Offset) acc[r][h] = _mm256_fmadd_ps(offset, _mm256_set1_ps(x.group(r).sum), acc[r][h]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) store_half(out.y + r * out.ld, out.columns, h, acc[r][h]);
  }
}

template <typename Weights>
void multiply_rows(const Weights& w, int64_t count, const Inputs& x, int64_t rows, const Output& out) {
  static constexpr decltype(&multiply<Weights, 1>) kKernels[kBlockRows] = {multiply<Weights, 1>, multiply<Weights, 2>,
                                                                           multiply<Weights, 3>, multiply<Weights, 4>};
  for (int64_t m = 0; m < rows; m += kBlockRows) {
    const int64_t block = rows - m < kBlockRows ? rows - m : kBlockRows;
    kKernels[block - 1](w, count, {x.values + m * x.ld, x.groups + m * x.ld_groups, x.ld, x.ld_groups},
                        {out.y + m * out.ld, out.ld, out.columns, out.first});
  }
}

// All rows of one panel.
template <typename L, Products P>
void run_panel(const uint8_t* panel, int64_t groups, const Inputs& x, int64_t rows, float* y, int64_t ldy,
               int64_t columns) {
  using S = Shape<P, L::Group, L::Offset>;
  Packed<L, P> packed(panel);
  if (rows <= kBlockRows) {  // unpacked in registers
    multiply_rows(packed, groups, x, rows, {y, ldy, columns, true});
    return;
  }
  Chunk<S> chunk;
  for (int64_t g = 0; g < groups; g += Chunk<S>::kGroups) {
    const int64_t count = groups - g < Chunk<S>::kGroups ? groups - g : Chunk<S>::kGroups;
    chunk.fill(packed, g, count);
    const Inputs at{x.values + g * S::kInputBytes, x.groups + g, x.ld, x.ld_groups};
    multiply_rows(Unpacked<S>(chunk), count, at, rows, {y, ldy, columns, g == 0});
  }
}

template <typename L, Products P>
void run(const IntWeights& w, const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
         int64_t column_end) {
  const auto* values = static_cast<const uint8_t*>(prepared);
  const int64_t groups = w.in_features / L::Group, ld = groups * Packed<L, P>::kInputBytes;
  const Inputs x{values, reinterpret_cast<const IntGroup*>(values + rows * ld), ld, groups};
  for (int64_t n = column_begin; n < column_end; n += kIntPanel) {
    const int64_t columns = column_end - n < kIntPanel ? column_end - n : kIntPanel;
    run_panel<L, P>(w.data + n / kIntPanel * w.panel_bytes, groups, x, rows, y + n, ldy, columns);
  }
}

template <typename L>
IntKernel kernel_for([[maybe_unused]] Activation activation) {
  if constexpr (L::kPayload == Payload::u8) {
    return run<L, Products::words>;
  } else {
    constexpr Products kBytes = L::kPayload == Payload::u4 ? Products::bytes : Products::pairs;
    return activation == Activation::int8 ? run<L, kBytes> : run<L, Products::words>;
  }
}

}  // namespace

void int_prepare_avx2(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features,
                      void* prepared, int64_t row_begin, int64_t row_end) {
  const auto run = form.group == 32 ? prepare_rows<32> : prepare_rows<16>;
  run(form, x, ldx, rows, features, static_cast<uint8_t*>(prepared), row_begin, row_end);
}

void int_run_avx2(const IntWeights& w, const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
                  int64_t column_end) {
  const IntKernel kernel = with_layout(w, [&]<typename L>(L) { return kernel_for<L>(w.activation); });
  kernel(w, prepared, rows, y, ldy, column_begin, column_end);
}

}  // namespace headrace
