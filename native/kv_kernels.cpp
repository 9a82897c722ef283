// Keys and values into their blocks. Compiled once per instruction set (see vectors.h).
#include "kernel_table.h"
#include "vectors.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

// How the features of one head of one token are stored; with the scale of that head where the format has one.
template <typename T>
struct Narrow;

template <>
struct Narrow<float> {
  Narrow(const float*, int32_t) {}
  float operator()(float x) const { return x; }
};

template <>
struct Narrow<uint16_t> {
  Narrow(const float*, int32_t) {}
  uint16_t operator()(float x) const { return to_bf16(x); }
};

// headrace.numerics.int8.quantize_int8, bit for bit.
template <>
struct Narrow<int8_t> {
  float scale;
  bool usable;

  Narrow(const float* x, int32_t n) {
    float peak = 0.0f;
    bool finite = true;
    for (int32_t i = 0; i < n; ++i) {
      const float size = __builtin_fabsf(x[i]);
      peak = size > peak ? size : peak;
      finite &= size <= 3.402823466e+38f;
    }
    scale = finite ? peak / 127.0f : __builtin_nanf("");
    usable = scale > 0.0f;
  }

  int8_t operator()(float x) const {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer, ties to even
    if (!usable) return 0;
    const float ratio = x / scale, low = ratio > -127.0f ? ratio : -127.0f, clamped = low < 127.0f ? low : 127.0f;
    return static_cast<int8_t>((clamped + kRound) - kRound);
  }
};

template <typename T>
void write_as(const AttentionShape& shape, const KvLayer& layer, int32_t block, int32_t offset, const float* k,
              const float* v) {
  const int64_t at = block * layer.block_bytes;
  T *keys = reinterpret_cast<T*>(layer.keys + at), *values = reinterpret_cast<T*>(layer.values + at);
  float* key_scales = reinterpret_cast<float*>(layer.key_scales + at);
  float* value_scales = reinterpret_cast<float*>(layer.value_scales + at);
  for (int32_t head = 0; head < shape.num_kv_heads; ++head, k += shape.head_dim, v += shape.head_dim) {
    const Narrow<T> key(k, shape.head_dim), value(v, shape.head_dim);
    T *to_key = keys + head * shape.head_values() + offset,
      *to_value = values + head * shape.head_values() + int64_t{offset} * shape.head_dim;
    for (int32_t d = 0; d < shape.head_dim; ++d) to_key[int64_t{d} * shape.block_size] = key(k[d]);
    for (int32_t d = 0; d < shape.head_dim; ++d) to_value[d] = value(v[d]);
    if constexpr (is_scaled<T>) {
      key_scales[head * shape.block_size + offset] = key.scale;
      value_scales[head * shape.block_size + offset] = value.scale;
    }
  }
}

}  // namespace

void write_kv(const AttentionShape& shape, const KvLayer& layer, int32_t block, int32_t offset, const float* k,
              const float* v) {
  switch (shape.format) {
    case KvFormat::f32:
      return write_as<float>(shape, layer, block, offset, k, v);
    case KvFormat::bf16:
      return write_as<uint16_t>(shape, layer, block, offset, k, v);
    case KvFormat::int8:
      return write_as<int8_t>(shape, layer, block, offset, k, v);
  }
}

}  // namespace headrace::HEADRACE_KERNELS
