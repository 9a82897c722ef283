// The integer family of linear kernels, for quantized weights on machines with integer dot products.
//
// Inputs become fixed-point numbers, group by group (a group is the features that share a weight's scale): with
// Activation::int16, 16 bits of the group's largest magnitude, with Activation::int8 8 bits of it. Products of codes
// and inputs are then summed in integers, exactly, so a group's sum has the same bits however it is computed: with
// bytes for few rows, with 16-bit words for many. What follows, in f32 and in increasing k, is one chain per output: y
// += float(sum) * (weight scale * input scale), and for weights with offsets y += offset * (sum of the group's inputs).
#pragma once

#include "formats.h"
#include "linear.h"

namespace headrace {

// Weights in panels of 16 columns; a panel is a sequence of blocks, of one group each or, of K-quants, of 256 features:
//   K-quants: d f16 [16], and dmin, if the format has offsets; then for each group
//   payload | scales [16] | offsets [16], if the format has them
// Scales and offsets are f16, of K-quants the int8 multiples of d and dmin; of row blocks scales are bf16, f16 or f32,
// and in place of offsets are int8 zero points, of which the offsets are -scale * zero point. Codes are q - min_q.
// Features go by quads of four: a 64-byte vector holds the quad's four bytes of each column.
//   u8   one vector per quad
//   u4   one vector per two quads, the even quad in the low nibbles
//   u6   the low four bits as u4; then the high two, one vector per four quads
struct IntWeights {
  enum class Payload : uint8_t { u4, u6, u8 };
  Payload payload;
  bool has_offset, two_levels, zero_points;
  ScaleType scales;
  Activation activation;
  int32_t min_q;
  int64_t out_features, in_features, group, block;
  uint8_t* data;
  int64_t header_bytes, payload_bytes, scale_bytes, offset_bytes, group_bytes, block_bytes, panel_bytes;
};

// What a row's input of one group carries beside its integers.
struct IntGroup {
  float scale;      // input = scale * integer
  float sum;        // of the group's inputs as rounded
  int32_t bias_hi;  // min_q * (sum of high bytes), min_q * (sum of low bytes): what codes leave out
  int32_t bias_lo;
};

// A prepared input on AVX2: [rows][features] words, of each quad in the order 0 2 1 3, or bytes, and [rows][groups]
// IntGroup, whose bias_lo is min_q * (sum of integers). On AVX-512 up to kFewRows rows are [groups][padded rows][high
// bytes, low bytes] and [groups][padded rows] IntGroup; more are as on AVX2. With Activation::int8 there are no high
// bytes, and bytes in place of words.
constexpr int64_t kFewRows = 8;
constexpr int64_t kIntPanel = 16;
constexpr int64_t kQuad = 4;

// The integer that a group's largest magnitude becomes. Of the one of 16 bits both bytes are at most 127.
constexpr float kTopInt16 = 32639.0f, kTopInt8 = 127.0f;

// Rows that a kernel for few rows computes: 1, 2, 4 or 8.
constexpr int64_t padded_rows(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : kFewRows; }

// Whether inputs are words on AVX2: of codes of 8 bits, whose min_q is -128, with int8 too.
constexpr bool reads_words(const InputForm& form) {
  return form.activation == Activation::int16 || form.layout == -128;
}

// A form's `layout` is min_q: inputs of weights that leave out different constants differ in their biases.
size_t int_prepared_bytes(const InputForm& form, int64_t rows, int64_t features);

// How a format lays out its groups, as constants of the kernels: what IntWeights holds as variables.
template <IntWeights::Payload P, int Group_, bool Offset_, bool TwoLevels_, ScaleType Scales_ = ScaleType::f16,
          bool ZeroPoints_ = false>
struct IntLayout {
  static constexpr IntWeights::Payload kPayload = P;
  static constexpr int Group = Group_;
  static constexpr bool Offset = Offset_, TwoLevels = TwoLevels_, ZeroPoints = ZeroPoints_;
  static constexpr ScaleType Scales = Scales_;
  static constexpr int kBits = P == IntWeights::Payload::u4 ? 4 : P == IntWeights::Payload::u6 ? 6 : 8;
  static constexpr int64_t kCodeBytes = Group * kIntPanel * kBits / 8;
  static constexpr int64_t kScaleBytes = TwoLevels ? 16 : Scales == ScaleType::f32 ? 64 : 32;
  static constexpr int64_t kOffsetBytes = !Offset ? 0 : ZeroPoints ? 16 : kScaleBytes;
  static constexpr int64_t kGroupBytes = kCodeBytes + kScaleBytes + kOffsetBytes;
  static constexpr int64_t kBlockGroups = TwoLevels ? 256 / Group : 1;
  static constexpr int64_t kHeaderBytes = TwoLevels ? (Offset ? 64 : 32) : 0;
  static constexpr int64_t kBlockBytes = kHeaderBytes + kBlockGroups * kGroupBytes;
};

namespace {  // files compiled for different instruction sets must not share inline code

// Weights are asked for twice. A core waits for few lines of L1 at a time, its L2 for many: so far ahead for what L2
// shall hold, in one stream through panels that lie one behind the other, and shortly ahead for L1.
constexpr int64_t kFarAhead = 16 << 10, kNearAhead = 1 << 10;

template <int64_t Bytes>
inline void ask_far(const uint8_t* at) {
  for (int64_t i = 0; i < Bytes; i += 64) __builtin_prefetch(at + kFarAhead + i, 0, 2);
}
template <int64_t Bytes>
inline void ask_near(const uint8_t* at) {
  for (int64_t i = 0; i < Bytes; i += 64) __builtin_prefetch(at + kNearAhead + i, 0, 3);
}

// call(the IntLayout of `w`)
template <typename Call>
inline auto with_layout(const IntWeights& w, Call call) {
  using enum IntWeights::Payload;
  if (w.two_levels) {
    if (w.payload == u6)
      return w.group == 32 ? call(IntLayout<u6, 32, true, true>{})                                         // q5_k
                           : call(IntLayout<u6, 16, false, true>{});                                       // q6_k
    if (w.group == 32) return call(IntLayout<u4, 32, true, true>{});                                       // q4_k
    return w.has_offset ? call(IntLayout<u4, 16, true, true>{}) : call(IntLayout<u4, 16, false, true>{});  // q2_k, q3_k
  }
  if (w.zero_points) {
    constexpr auto f32 = ScaleType::f32, bf16 = ScaleType::bf16;
    if (w.payload == u4) {
      return w.scales == f32 ? call(IntLayout<u4, 32, true, false, f32, true>{})
                             : call(IntLayout<u4, 32, true, false, bf16, true>{});
    }
    return w.scales == f32 ? call(IntLayout<u8, 32, true, false, f32, true>{})
                           : call(IntLayout<u8, 32, true, false, bf16, true>{});
  }
  if (w.scales == ScaleType::bf16) {
    if (w.payload == u4) return call(IntLayout<u4, 32, false, false, ScaleType::bf16>{});
    if (w.payload == u6) return call(IntLayout<u6, 32, false, false, ScaleType::bf16>{});  // mxfp4
    return call(IntLayout<u8, 32, false, false, ScaleType::bf16>{});
  }
  if (w.scales == ScaleType::f32) {
    return w.payload == u4 ? call(IntLayout<u4, 32, false, false, ScaleType::f32>{})
                           : call(IntLayout<u8, 32, false, false, ScaleType::f32>{});
  }
  if (w.payload == u8) return call(IntLayout<u8, 32, false, false>{});  // q8_0
  if (w.payload == u6) {                                                // q5_1, q5_0
    return w.has_offset ? call(IntLayout<u6, 32, true, false>{}) : call(IntLayout<u6, 32, false, false>{});
  }
  return w.has_offset ? call(IntLayout<u4, 32, true, false>{}) : call(IntLayout<u4, 32, false, false>{});  // q4_1, q4_0
}

}  // namespace

using IntPrepare = void (*)(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features,
                            void* prepared, int64_t row_begin, int64_t row_end);
using IntKernel = void (*)(const IntWeights& weights, const void* prepared, int64_t rows, float* y, int64_t ldy,
                           int64_t column_begin, int64_t column_end);

void int_prepare_avx512_vnni(const InputForm&, const float*, int64_t, int64_t, int64_t, void*, int64_t, int64_t);
void int_run_avx512_vnni(const IntWeights&, const void*, int64_t, float*, int64_t, int64_t, int64_t);
void int_prepare_avx2(const InputForm&, const float*, int64_t, int64_t, int64_t, void*, int64_t, int64_t);
void int_run_avx2(const IntWeights&, const void*, int64_t, float*, int64_t, int64_t, int64_t);

// Of `isa`: avx512_vnni or avx2.
std::unique_ptr<Linear> make_int_linear(Format format, int64_t out_features, int64_t in_features, Isa isa,
                                        Activation activation);

}  // namespace headrace
