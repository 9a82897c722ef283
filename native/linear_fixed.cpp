// The fixed-point family's side of the contract in linear.h: shapes, memory, packing. The kernels are in
// linear_fixed_amx.cpp.
#include "linear_fixed.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "formats.h"

#if defined(__x86_64__)

namespace headrace {
namespace {

constexpr float kTopWeight = 32623.0f;  // leaves room for what rounding steps and bases adds
constexpr float kTopDigit = 127.0f;
constexpr int kBias = 128;  // bases carry it, so that low digits of weights are unsigned bytes

int16_t to_int16(float value) { return static_cast<int16_t>(std::lrintf(value)); }

class FixedLinear final : public Linear {
 public:
  FixedLinear(Format format, int64_t out, int64_t in, Activation activation) {
    const FormatTraits& t = traits(format);
    FixedWeights& w = weights_;
    max_q_ = t.max_q;
    w.four_bits = t.max_q - t.min_q < 16;
    const bool one_scale = t.block == in && (is_row_blocks(format) || t.block == t.group);
    w.one_digit = activation == Activation::int8 || (one_scale && !w.four_bits && !t.has_offset);
    w.has_offset = t.has_offset;
    w.group = t.group;
    w.min_q = t.min_q;
    while (!w.four_bits && std::max(-t.min_q, t.max_q + 1) << (code_shift_ + 1) <= 128) ++code_shift_;
    w.out_features = out;
    w.in_features = in;
    code_bytes_ = kFixedPanel * t.group / (w.four_bits ? 2 : 1);
    w.group_bytes = code_bytes_ + kFixedPanel * 2 * (t.has_offset ? 2 : 1);
    w.panel_bytes = kFixedPanel * sizeof(float) + in / t.group * w.group_bytes;
    if (w.stores_digits())
      w.panel_bytes = kFixedPanel * (sizeof(float) + (in + kFixedBlock - 1) / kFixedBlock * kFixedBlock);
    w.panel_bytes = (w.panel_bytes + 63) / 64 * 64;

    out_features = out;
    in_features = in;
    form = {Isa::amx, Activation::int16, w.one_digit ? 0 : t.group,
            w.one_digit   ? kFixedOneDigit
            : w.four_bits ? kFixedBytes
                          : kFixedWords};
    kernel = w.four_bits ? (w.one_digit ? "amx w4a16, one digit" : "amx w4a16")
                         : (w.one_digit ? "amx w8a16, one digit" : "amx w8a16");
    if (w.one_digit) column_tile = 2 * kFixedPanel;
    packed_bytes = (out + kFixedPanel - 1) / kFixedPanel * w.panel_bytes;
  }

  void place(uint8_t* memory) override { weights_.data = memory; }

  void run(const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
           int64_t column_end) const override {
    assert(column_begin % column_tile == 0 && column_end <= out_features);
    if (rows > 0 && column_begin < column_end)
      fixed_run(weights_, form, prepared, rows, y, ldy, column_begin, column_end);
  }

  void pack(const WeightView& view, int64_t column_begin, int64_t column_end) override {
    assert(view.out_features == out_features && view.in_features == in_features && column_begin % column_tile == 0);
    const int64_t groups = in_features / weights_.group;
    std::vector<int8_t> q(in_features);
    std::vector<float> scale(groups), offset(groups, 0.0f);
    for (int64_t n = column_begin; n < column_end; n += kFixedPanel) {
      uint8_t* panel = weights_.data + n / kFixedPanel * weights_.panel_bytes;
      std::memset(panel, 0, weights_.panel_bytes);
      for (int64_t lane = 0; lane < std::min(kFixedPanel, out_features - n); ++lane) {
        decode_quants(view.format, view.data + (n + lane) * view.row_bytes, in_features, q.data(), scale.data(),
                      offset.data());
        if (weights_.stores_digits()) {
          pack_digits(q.data(), scale, offset, lane, panel);
        } else {
          pack_column(q.data(), scale, offset, lane, panel);
        }
      }
    }
  }

 private:
  // A step of 1 in units of the weight: 8-bit codes are multiplied by step / 128.
  float levels() const { return weights_.four_bits ? 1.0f : static_cast<float>(128 >> code_shift_); }

  // What the codes of this format can stand for decides the unit, and what steps may be; of one digit, what these codes
  // do: sums of steps and bases that do not occur may wrap around. NaN if one of them is damaged.
  float unit_of(const int8_t* q, const std::vector<float>& scale, const std::vector<float>& offset) const {
    float most = 0, step = 0;
    for (size_t g = 0; g < scale.size(); ++g) {
      if (!std::isfinite(scale[g]) || !std::isfinite(offset[g])) return std::numeric_limits<float>::quiet_NaN();
      most =
          std::max({most, std::fabs(scale[g] * weights_.min_q + offset[g]), std::fabs(scale[g] * max_q_ + offset[g])});
      step = std::max(step, std::fabs(scale[g]) * levels());
    }
    if (weights_.one_digit) most = std::max(most_of(q, scale, offset), most / 8);  // 8: f32 still holds the bases
    return std::max(most, step) / kTopWeight;
  }

  void pack_column(const int8_t* q, const std::vector<float>& scale, const std::vector<float>& offset, int64_t lane,
                   uint8_t* panel) const {
    const float unit = unit_of(q, scale, offset), inverse = unit > 0 ? 1.0f / unit : 0.0f;
    const float read = weights_.one_digit ? 256.0f * unit : unit;
    std::memcpy(panel + lane * sizeof read, &read, sizeof read);
    uint8_t* to = panel + kFixedPanel * sizeof(float);
    const int group = weights_.group;
    for (size_t g = 0; g < scale.size(); ++g, to += weights_.group_bytes, q += group) {
      int16_t step = to_int16(scale[g] * inverse * levels()), base = kBias;
      if (weights_.has_offset) base = static_cast<int16_t>(base + to_int16(offset[g] * inverse));
      if (weights_.four_bits) {
        if (weights_.has_offset) base = static_cast<int16_t>(base + step * weights_.min_q);
        for (int k = 0; k < group; ++k) {
          const int code = q[k] - weights_.min_q;
          to[k / 8 * 64 + lane * 4 + k % 4] |= static_cast<uint8_t>(code << (k % 8 / 4 * 4));
        }
      } else {
        for (int k = 0; k < group; ++k) to[k / 4 * 64 + lane * 4 + k % 4] = static_cast<uint8_t>(q[k] << code_shift_);
      }
      std::memcpy(to + code_bytes_ + lane * 2, &step, sizeof step);
      if (weights_.has_offset) std::memcpy(to + code_bytes_ + kFixedPanel * 2 + lane * 2, &base, sizeof base);
    }
  }

  // Codes of one scale are digits as they are; others become multiples of 1 / 127 of the largest weight.
  void pack_digits(const int8_t* q, const std::vector<float>& scale, const std::vector<float>& offset, int64_t lane,
                   uint8_t* panel) const {
    const int group = weights_.group;
    const auto same = [&](float s) { return s == scale[0]; };
    const auto none = [](float o) { return o == 0.0f; };
    const auto finite = [](float v) { return std::isfinite(v); };
    const bool exact = std::all_of(scale.begin(), scale.end(), same) && std::all_of(offset.begin(), offset.end(), none);
    float unit = std::numeric_limits<float>::quiet_NaN();
    if (std::all_of(scale.begin(), scale.end(), finite) && std::all_of(offset.begin(), offset.end(), finite))
      unit = exact ? scale[0] : most_of(q, scale, offset) / kTopDigit;
    std::memcpy(panel + lane * sizeof unit, &unit, sizeof unit);
    uint8_t* to = panel + kFixedPanel * sizeof(float) + lane * 4;
    const auto put = [&](int64_t k, int digit) { to[k / 4 * 64 + k % 4] = static_cast<uint8_t>(digit + 128); };
    if (exact) {
      for (int64_t k = 0; k < in_features; ++k) put(k, q[k]);
      return;
    }
    for (size_t g = 0; g < scale.size(); ++g) {
      for (int64_t k = g * group; k < static_cast<int64_t>(g + 1) * group; ++k) {
        const float digits = unit > 0 ? (scale[g] * q[k] + offset[g]) / unit : 0.0f;
        put(k, static_cast<int>(std::lrintf(std::clamp(digits, -kTopDigit, kTopDigit))));
      }
    }
  }

  // The largest magnitude of a column's weights.
  float most_of(const int8_t* q, const std::vector<float>& scale, const std::vector<float>& offset) const {
    float most = 0;
    for (size_t g = 0; g < scale.size(); ++g, q += weights_.group) {
      const auto [low, high] = std::minmax_element(q, q + weights_.group);
      most = std::max({most, std::fabs(scale[g] * *low + offset[g]), std::fabs(scale[g] * *high + offset[g])});
    }
    return most;
  }

  FixedWeights weights_{};
  int max_q_ = 0, code_shift_ = 0;  // 8-bit codes are stored shifted: the largest makes full use of a byte
  int64_t code_bytes_ = 0;
};

}  // namespace

FixedInputs::FixedInputs(const InputForm& form, int64_t num_rows, int64_t features)
    : few(num_rows <= fixed_few_rows(form.layout)),
      rows(!few ? (num_rows + 15) / 16 * 16 : static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(num_rows)))),
      blocks((features + kFixedBlock - 1) / kFixedBlock),
      stretches(Stretches(blocks).count),
      stretch_blocks(Stretches(blocks).blocks),
      groups(few && form.group > 0 ? features / form.group : 0),
      scales(rows * blocks * kFixedBlock * (few && form.layout == kFixedWords ? 4 : 2)),
      sums(scales + rows * sizeof(float)),
      group_sums(sums + stretches * rows * sizeof(int32_t)),
      bytes(group_sums + groups * rows * sizeof(int32_t)) {}

std::unique_ptr<Linear> make_fixed_linear(Format format, int64_t out_features, int64_t in_features,
                                          Activation activation) {
  return std::make_unique<FixedLinear>(format, out_features, in_features, activation);
}

}  // namespace headrace

#endif
