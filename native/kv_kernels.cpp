// Keys and values into their blocks. Compiled once per instruction set (see vectors.h).
#include "kernel_table.h"
#include "kv_codes.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

constexpr float kLargest = 3.402823466e+38f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer, ties to even

int32_t count_at(int32_t i, int32_t n) { return n - i < kLanes ? n - i : static_cast<int32_t>(kLanes); }

// The largest magnitude of n values by its bits, which are in the order of the numbers, with infinities and NaN last.
int32_t largest_bits(const float* x, int32_t n) {
  i32x16 largest = {};
  for (int32_t i = 0; i < n; i += kLanes) {
    const i32x16 bits = bits_as<i32x16>(load_part(x + i, count_at(i, n))) & 0x7FFFFFFF;
    largest = max(bits, largest);
  }
  return max(largest);
}

// The largest magnitude of n values; NaN if one of them is not finite.
float peak_of(const float* x, int32_t n) {
  const float peak = std::bit_cast<float>(largest_bits(x, n));
  return peak <= kLargest ? peak : __builtin_nanf("");
}

// Whether one head of a token stays finite as T. Of one that does not, the key becomes NaN and the value zero: queries
// that see it show it, and for the others, who multiply values they do not see by zero, it is nothing.
template <typename T>
bool is_finite_as(const float* k, const float* v, int32_t n) {
  constexpr int32_t kMost = std::is_same_v<T, uint16_t> ? 0x7F7F7FFF : 0x7F7FFFFF;  // bf16 rounds larger ones up
  return largest_bits(k, n) <= kMost && largest_bits(v, n) <= kMost;
}

HEADRACE_INLINE i32x16 nearest_codes(f32x16 ratios, float least, float most) {
  const f32x16 low = max(ratios, broadcast(least)), high = broadcast(most);
  return bits_as<i32x16>(select(low < high, low, high) + kRound) - std::bit_cast<int32_t>(kRound);
}

// How the features of one head of one token are stored; with the scale of that head where the format has one.
template <typename T>
struct Narrow;

template <>
struct Narrow<float> {
  Narrow(const float*, int32_t) {}
  float operator()(float x) const { return x; }
};

// headrace.numerics.kv_cache, bit for bit.
template <>
struct Narrow<E4m3> {
  float scale;

  Narrow(const float* x, int32_t n) : scale(peak_of(x, n) / 448.0f) {}
  E4m3 operator()(float x) const { return scale > 0.0f ? to_e4m3(x / scale) : E4m3{0}; }
};

// As above: integers, whose scales are four bytes of whatever the format makes of them.
template <typename Codes>
struct NarrowGroup;

template <>
struct NarrowGroup<Int8Codes> {
  float scale;

  NarrowGroup(const float* x, int32_t n) : scale(peak_of(x, n) / 127.0f) {}
  i32x16 operator()(f32x16 x) const { return scale > 0.0f ? nearest_codes(x / scale, -127.0f, 127.0f) : i32x16{}; }
  uint32_t stored_scale() const { return std::bit_cast<uint32_t>(scale); }
};

template <>
struct NarrowGroup<Int4Codes> {
  uint16_t scale_bits, lowest_bits;
  float scale, lowest;

  NarrowGroup(const float* x, int32_t n) {
    float least = x[0], most = x[0];
    for (int32_t i = 1; i < n; ++i) {
      least = x[i] < least ? x[i] : least;
      most = x[i] > most ? x[i] : most;
    }
    const bool finite = peak_of(x, n) <= kLargest;
    lowest_bits = to_bf16(finite ? least : __builtin_nanf(""));
    lowest = from_bf16(lowest_bits);
    scale_bits = to_bf16((most - lowest) / 15.0f);
    scale = from_bf16(scale_bits);
    if (!(scale <= kLargest)) scale_bits = lowest_bits = to_bf16(__builtin_nanf(""));  // too wide to tell, or damaged
  }
  i32x16 operator()(f32x16 x) const {
    return scale > 0.0f && scale <= kLargest ? nearest_codes((x - lowest) / scale, 0.0f, 15.0f) : i32x16{};
  }
  uint32_t stored_scale() const { return uint32_t{scale_bits} << 16 | lowest_bits; }
};

template <typename T>
void write_as(const AttentionShape& shape, const KvLayer& layer, int32_t block, int32_t offset, const float* k,
              const float* v) {
  const int64_t at = block * layer.block_bytes, values_of_head = int64_t{shape.head_dim} * shape.block_size;
  T *keys = reinterpret_cast<T*>(layer.keys + at), *values = reinterpret_cast<T*>(layer.values + at);
  float* key_scales = reinterpret_cast<float*>(layer.key_scales + at);
  float* value_scales = reinterpret_cast<float*>(layer.value_scales + at);
  for (int32_t head = 0; head < shape.num_kv_heads; ++head, k += shape.head_dim, v += shape.head_dim) {
    const Narrow<T> key(k, shape.head_dim), value(v, shape.head_dim);
    T *to_key = keys + head * values_of_head + offset,
      *to_value = values + head * values_of_head + int64_t{offset} * shape.head_dim;
    for (int32_t d = 0; d < shape.head_dim; ++d) to_key[int64_t{d} * shape.block_size] = key(k[d]);
    for (int32_t d = 0; d < shape.head_dim; ++d) to_value[d] = value(v[d]);
    if constexpr (std::is_same_v<T, float>) {
      if (is_finite_as<T>(k, v, shape.head_dim)) continue;
      for (int32_t d = 0; d < shape.head_dim; ++d) to_key[int64_t{d} * shape.block_size] = __builtin_nanf("");
      for (int32_t d = 0; d < shape.head_dim; ++d) to_value[d] = 0.0f;
    }
    if constexpr (std::is_same_v<T, E4m3>) {
      key_scales[head * shape.block_size + offset] = key.scale;
      value_scales[head * shape.block_size + offset] = value.scale;
    }
  }
}

// In pairs: of features in keys, of tokens in values, where the other one's half stays as it is.
void write_bf16(const AttentionShape& shape, const KvLayer& layer, int32_t block, int32_t offset, const float* k,
                const float* v) {
  const int32_t dim = shape.head_dim;
  const int64_t at = block * layer.block_bytes, head_bytes = kv_head_bytes(shape.format, dim, shape.block_size);
  const int64_t stride = shape.block_size;
  const int shift = offset % 2 * 16;
  const int32_t kept = static_cast<int32_t>(0xFFFF0000u >> shift);
  for (int32_t head = 0; head < shape.num_kv_heads; ++head, k += dim, v += dim) {
    int32_t* keys = reinterpret_cast<int32_t*>(layer.keys + at + head * head_bytes) + offset;
    int32_t* values = reinterpret_cast<int32_t*>(layer.values + at + head * head_bytes) + offset / 2 * int64_t{dim};
    const bool finite = is_finite_as<uint16_t>(k, v, dim);
    const auto as_stored = [&](const float* x, int32_t count, int32_t otherwise) {
      return finite ? to_bf16(load_part(x, count)) : spread<i32x16>(otherwise);
    };
    for (int32_t d = 0; d < dim; d += kLanes) {
      const int32_t count = count_at(d, dim);
      int16_t codes[kLanes];
      store_low16(codes, as_stored(k + d, count, 0x7FC0));
      for (int32_t i = 0; i < count; i += 2) __builtin_memcpy(keys + (d + i) / 2 * stride, codes + i, sizeof *keys);
      const i32x16 mine = as_stored(v + d, count, 0) << shift;
      store_part(values + d, (load_part(values + d, count) & kept) | mine, count);
    }
  }
}

// The codes of one head of one token, group by group, and its scales, `block_size` apart.
template <typename Codes>
void narrow_head(const AttentionShape& shape, const float* x, int32_t* codes, uint32_t* scales) {
  const int32_t group = static_cast<int32_t>(Codes::group(shape.head_dim));
  for (int32_t begin = 0; begin < shape.head_dim; begin += group, scales += shape.block_size) {
    const int32_t end = begin + group < shape.head_dim ? begin + group : shape.head_dim;
    const NarrowGroup<Codes> narrow(x + begin, end - begin);
    for (int32_t d = begin; d < end; d += kLanes) {
      const int32_t count = count_at(d, end);
      store_part(codes + d, narrow(load_part(x + d, count)), count);
    }
    *scales = narrow.stored_scale();
  }
}

template <typename Codes>
void write_codes(const AttentionShape& shape, const KvLayer& layer, int32_t block, int32_t offset, const float* k,
                 const float* v) {
  const int32_t dim = shape.head_dim;
  const int64_t head_bytes = kv_head_bytes(shape.format, dim, shape.block_size);
  const int64_t head_scales = kv_scales(shape.format, dim) * shape.block_size;
  const int64_t at = block * layer.block_bytes;
  float rotated[2 * kMaxIntegerHeadDim];
  int32_t codes[kMaxIntegerHeadDim];
  uint8_t *keys = layer.keys + at, *values = layer.values + at;
  uint32_t* key_scales = reinterpret_cast<uint32_t*>(layer.key_scales + at) + offset;
  uint32_t* value_scales = reinterpret_cast<uint32_t*>(layer.value_scales + at) + offset;
  for (int32_t head = 0; head < shape.num_kv_heads; ++head, k += dim, v += dim) {
    const float* key = k;
    if (Codes::kRotated) {
      __builtin_memcpy(rotated, key, dim * sizeof(float));
      rotate_head(rotated, dim, rotated + dim);
      key = rotated;
    }
    narrow_head<Codes>(shape, key, codes, key_scales);
    int64_t pair = offset;
    for (int32_t d = 0; d + 1 < dim; d += 2, pair += shape.block_size)
      Codes::put_pair(keys, pair, codes[d], codes[d + 1]);
    if (dim % 2 != 0) Codes::put(keys, pair, 0, codes[dim - 1]);
    narrow_head<Codes>(shape, v, codes, value_scales);
    const int64_t row = offset / 2 * int64_t{dim};
    for (int32_t d = 0; d < dim; ++d) Codes::put(values, row + d, offset % 2, codes[d]);
    keys += head_bytes;
    values += head_bytes;
    key_scales += head_scales;
    value_scales += head_scales;
  }
}

}  // namespace

void write_kv(const AttentionShape& shape, const KvLayer& layer, int32_t block, int32_t offset, const float* k,
              const float* v) {
  switch (shape.format) {
    case KvFormat::f32:
      return write_as<float>(shape, layer, block, offset, k, v);
    case KvFormat::bf16:
      return write_bf16(shape, layer, block, offset, k, v);
    case KvFormat::fp8:
      return write_as<E4m3>(shape, layer, block, offset, k, v);
    case KvFormat::int8:
      return write_codes<Int8Codes>(shape, layer, block, offset, k, v);
    case KvFormat::int4:
      return write_codes<Int4Codes>(shape, layer, block, offset, k, v);
  }
}

}  // namespace headrace::HEADRACE_KERNELS
