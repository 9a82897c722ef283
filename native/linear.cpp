// Choosing a kernel for a weight, and the f32 family's side of the contract in linear.h.
#include "linear.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats.h"
#include "isa.h"
#include "linear_f32.h"
#include "linear_fixed.h"
#include "linear_int.h"
#include "linear_tile.h"

namespace headrace {

Linear::~Linear() = default;

namespace {

using Payload = PanelWeights::Payload;

Payload payload_of(Format format) {
  if (format == Format::f32) return Payload::f32;
  if (format == Format::f16) return Payload::f16;
  if (format == Format::bf16) return Payload::bf16;
  const FormatTraits& t = traits(format);
  if (t.is_e4m3) return Payload::e4m3;
  return t.max_q - t.min_q < 16 ? Payload::u4 : Payload::i8;
}

// Bytes that 16 columns of one feature take, times two (a u4 feature takes half a byte per column).
int64_t panel_bytes(Payload payload, int64_t features) {
  switch (payload) {
    case Payload::f32:
      return features * kPanel * 4;
    case Payload::f16:
    case Payload::bf16:
      return features * kPanel * 2;
    case Payload::i8:
    case Payload::e4m3:
      return features * kPanel;
    default:
      return features * kPanel / 2;
  }
}

// Interleave the rows of a panel of plain values, `lanes` of them: out[k][lane] = row[lane][k]. A run of features at a
// time, so that what all lanes write lies in L1.
template <typename T>
void interleave(const uint8_t* rows, int64_t row_bytes, int64_t lanes, int64_t features, uint8_t* panel) {
  constexpr int64_t kRun = 64;
  for (int64_t begin = 0; begin < features; begin += kRun) {
    const int64_t end = std::min(begin + kRun, features);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const uint8_t* row = rows + lane * row_bytes;
      T* out = reinterpret_cast<T*>(panel) + lane;
      for (int64_t k = begin; k < end; ++k) std::memcpy(out + k * kPanel, row + k * sizeof(T), sizeof(T));
    }
  }
}

F32Kernel f32_kernel(Isa isa) {
#ifdef HEADRACE_X86
  if (isa >= Isa::avx512) return linear_f32_avx512;
  if (isa == Isa::avx2) return linear_f32_avx2;
#endif
  assert(isa == Isa::portable);
  return linear_f32_portable;
}

const char* f32_kernel_name(Isa isa, Payload payload) {
  static constexpr const char* kNames[3][6] = {
      {"portable f32", "portable f16", "portable bf16", "portable w8", "portable w4", "portable fp8"},
      {"avx2 f32", "avx2 f16", "avx2 bf16", "avx2 w8", "avx2 w4", "avx2 fp8"},
      {"avx512 f32", "avx512 f16", "avx512 bf16", "avx512 w8", "avx512 w4", "avx512 fp8"},
  };
  return kNames[static_cast<int>(isa)][static_cast<int>(payload)];
}

class F32Linear final : public Linear {
 public:
  F32Linear(Format format, int64_t out, int64_t in, Isa isa, Activation activation) {
    const FormatTraits& t = traits(format);
    const int64_t panels = (out + kPanel - 1) / kPanel;
    const Payload payload = payload_of(format);
    weights_ = {payload, out,    in, t.group, static_cast<float>(t.min_q), nullptr, panel_bytes(payload, in),
                nullptr, nullptr};
    data_bytes_ = panels * weights_.panel_bytes;  // with scales, a multiple of 64: groups have 16 features or more
    scale_bytes_ = t.group ? panels * (in / t.group) * kPanel * sizeof(float) : 0;
    has_offset_ = t.has_offset;

    out_features = out;
    in_features = in;
    // Where there are no integer kernels, inputs in fixed point are multiplied as the f32 numbers that they stand for.
    form = {isa, activation, is_fixed_point(activation) ? t.group : 0, 0};
    kernel = f32_kernel_name(isa, payload);
    packed_bytes = data_bytes_ + scale_bytes_ * (t.has_offset ? 2 : 1);
    run_ = f32_kernel(isa);
  }

  void place(uint8_t* memory) override {
    weights_.data = data_ = memory;
    if (scale_bytes_) weights_.scales = scales_ = reinterpret_cast<float*>(memory + data_bytes_);
    if (has_offset_) weights_.offsets = offsets_ = reinterpret_cast<float*>(memory + data_bytes_ + scale_bytes_);
  }

  void run(const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
           int64_t column_end) const override {
    assert(column_begin % column_tile == 0 && column_end <= out_features);
    run_(weights_, static_cast<const float*>(prepared), rows, y, ldy, column_begin, column_end);
  }

  void pack(const WeightView& w, int64_t column_begin, int64_t column_end) override {
    assert(w.out_features == out_features && w.in_features == in_features && column_begin % column_tile == 0);
    for (int64_t n = column_begin; n < column_end; n += kPanel) pack_panel(w, n / kPanel);
  }

 private:
  void pack_panel(const WeightView& w, int64_t panel) {
    uint8_t* out = data_ + panel * weights_.panel_bytes;
    const int64_t lanes = std::min(kPanel, out_features - panel * kPanel);
    if (lanes < kPanel) clear_panel(panel);
    const uint8_t* rows = w.data + panel * kPanel * w.row_bytes;
    if (weights_.payload == Payload::f32) return interleave<uint32_t>(rows, w.row_bytes, lanes, in_features, out);
    if (weights_.group == 0) return interleave<uint16_t>(rows, w.row_bytes, lanes, in_features, out);
    for (int64_t lane = 0; lane < lanes; ++lane) pack_quants(w.format, rows + lane * w.row_bytes, panel, lane, out);
  }

  // Lanes past the last column multiply to zero instead of to whatever the memory held.
  void clear_panel(int64_t panel) {
    std::memset(data_ + panel * weights_.panel_bytes, 0, weights_.panel_bytes);
    if (weights_.group == 0) return;
    const int64_t floats = in_features / weights_.group * kPanel;
    std::fill_n(scales_ + panel * floats, floats, 0.0f);
    if (weights_.offsets) std::fill_n(offsets_ + panel * floats, floats, 0.0f);
  }

  void pack_quants(Format format, const uint8_t* row, int64_t panel, int64_t lane, uint8_t* out) {
    const FormatTraits& t = traits(format);
    std::vector<int8_t> q(t.block);
    std::vector<float> scale(t.block / t.group), offset(t.block / t.group);
    for (int64_t k = 0; k < in_features; k += t.block, row += t.block_bytes) {
      decode_quants(format, row, t.block, q.data(), scale.data(), offset.data());
      for (int i = 0; i < t.block / t.group; ++i) {
        const int64_t at = ((panel * in_features + k) / t.group + i) * kPanel + lane;
        scales_[at] = scale[i];
        if (t.has_offset) offsets_[at] = offset[i];
      }
      if (weights_.payload != Payload::u4) {
        for (int i = 0; i < t.block; ++i) out[(k + i) * kPanel + lane] = static_cast<uint8_t>(q[i]);
      } else {
        for (int i = 0; i < t.block; i += 2) {
          out[(k + i) / 2 * kPanel + lane] = static_cast<uint8_t>((q[i] - t.min_q) | (q[i + 1] - t.min_q) << 4);
        }
      }
    }
  }

  PanelWeights weights_{};
  size_t data_bytes_ = 0, scale_bytes_ = 0;
  bool has_offset_ = false;
  uint8_t* data_ = nullptr;
  float *scales_ = nullptr, *offsets_ = nullptr;
  F32Kernel run_ = nullptr;
};

// What the integer kernels read, as f32.
void round_to_fixed_point(const float* x, int64_t count, Activation activation, float* out) {
  const float top = activation == Activation::int8 ? kTopInt8 : kTopInt16;
  float most = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    most = std::max(most, std::fabs(x[i]));
    finite = finite && std::isfinite(x[i]);
  }
  const float scale = !finite ? NAN : most < 0x1p-100f ? 0.0f : most / top;
  const float inverse = scale == 0.0f ? 0.0f : top / most;
  for (int64_t i = 0; i < count; ++i) out[i] = std::nearbyintf(x[i] * inverse) * scale;
}

}  // namespace

// Whether an input goes to integer kernels: of the f32 family, only `portable` takes fixed point.
constexpr bool is_int_form(const InputForm& form) {
  return is_fixed_point(form.activation) && form.isa != Isa::portable && form.isa != Isa::avx512;
}

// Whether an input goes to the fixed-point kernels.
constexpr bool is_fixed_form(const InputForm& form) {
  return form.isa == Isa::amx && form.activation == Activation::int16;
}

constexpr Activation kActivations[] = {Activation::f32, Activation::int16, Activation::bf16, Activation::int8};

const char* activation_name(Activation activation) {
  constexpr const char* kNames[] = {"f32", "int16", "bf16", "int8"};
  return kNames[static_cast<int>(activation)];
}

Activation choose_activation(const std::string& name, Isa isa) {
  if (name == "auto") return isa >= Isa::avx512_vnni || isa == Isa::avx2 ? Activation::int16 : Activation::f32;
  for (Activation activation : kActivations) {
    if (name == activation_name(activation)) return activation;
  }
  throw std::invalid_argument("activations are auto, f32, int16, bf16 and int8, not '" + name + "'");
}

size_t prepared_bytes(const InputForm& form, int64_t rows, int64_t features) {
#ifdef HEADRACE_X86
  if (is_fixed_form(form)) return FixedInputs(form, rows, features).bytes;
  if (form.isa == Isa::amx) return amx_prepared_bytes(form, rows, features);
  if (is_int_form(form)) return int_prepared_bytes(form, rows, features);
#endif
  return rows * features * sizeof(float);
}

void prepare(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features, void* prepared,
             int64_t row_begin, int64_t row_end) {
#ifdef HEADRACE_X86
  if (is_fixed_form(form)) {
    fixed_prepare(form, x, ldx, rows, features, prepared, row_begin, row_end);
    return;
  }
  if (form.isa == Isa::amx) {
    amx_prepare(form, x, ldx, rows, features, prepared, row_begin, row_end);
    return;
  }
  if (is_int_form(form)) {
    const IntPrepare run = form.isa == Isa::avx512_vnni ? int_prepare_avx512_vnni : int_prepare_avx2;
    run(form, x, ldx, rows, features, prepared, row_begin, row_end);
    return;
  }
#endif
  float* out = static_cast<float*>(prepared);
  for (int64_t m = row_begin; m < row_end; ++m) {
    const float* from = x + m * ldx;
    float* to = out + m * features;
    if (form.activation == Activation::f32) {
      std::memcpy(to, from, features * sizeof(float));
    } else if (form.activation == Activation::bf16) {
      for (int64_t k = 0; k < features; ++k) to[k] = bf16_to_f32(f32_to_bf16(from[k]));
    } else {
      for (int64_t k = 0; k < features; k += form.group)
        round_to_fixed_point(from + k, form.group, form.activation, to + k);
    }
  }
}

std::unique_ptr<Linear> make_linear(Format format, int64_t out_features, int64_t in_features, Isa isa,
                                    Activation activation) {
  const FormatTraits& t = traits(format);
  const std::string shape = "[" + std::to_string(out_features) + ", " + std::to_string(in_features) + "]";
  if (out_features < 1 || in_features < 1) throw std::invalid_argument("weight " + shape + " is empty");
  if (in_features % t.block != 0) {
    throw std::invalid_argument("weight " + shape + " in " + t.name + ": in_features must be a multiple of " +
                                std::to_string(t.block));
  }
  if (!isa_available(isa)) {
    throw std::invalid_argument(std::string("instruction set ") + isa_name(isa) + " is not available here");
  }
  const bool has_int_layout = t.group != 0 && (!is_row_blocks(format) || (t.group == 32 && !t.is_e4m3));
  if (!has_int_layout && is_fixed_point(activation)) activation = Activation::f32;
#ifdef HEADRACE_X86
  if (is_fixed_point(activation) && isa == Isa::amx)
    return make_fixed_linear(format, out_features, in_features, activation);
  if (is_fixed_point(activation) && (isa == Isa::avx512_vnni || isa == Isa::avx2)) {
    return make_int_linear(format, out_features, in_features, isa, activation);
  }
  // AMX multiplies bf16: exact for bf16 and quantized weights, a rounding for f32 and f16, which stay in f32.
  if (isa == Isa::amx && format != Format::f32 && format != Format::f16 && !is_row_blocks(format)) {
    return make_amx_linear(format, out_features, in_features, activation);
  }
#endif
  return std::make_unique<F32Linear>(format, out_features, in_features, std::min(isa, Isa::avx512), activation);
}

}  // namespace headrace
