// Sixteen floats or integers, or eight doubles, at a time: one register with AVX-512, two with AVX2, four with SSE2 or
// NEON. Included by `*_kernels.cpp`, which are compiled once per instruction set, and by attention*_amx.cpp: everything
// here has internal linkage, so that no instruction set's copy can stand in for another's.
//
// A register is one of the compilers' generic vectors (GCC, Clang). Several are `Two` halves, each with a name: generic
// vectors longer than a register, and arrays in their place, GCC keeps in memory.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace headrace {
namespace {

#define HEADRACE_INLINE inline __attribute__((always_inline, unused))
#define HEADRACE_INLINE_LAMBDA __attribute__((always_inline))

// A byte that holds an 8-bit float: see headrace.numerics.float8.
struct E4m3 {
  uint8_t code;
};

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename Half>
struct Two {
  Half a, b;
};

template <typename T, int N>
struct LanesOf {
  using type = Two<typename LanesOf<T, N / 2>::type>;
};
template <typename T, int N>
  requires(N * sizeof(T) <= kRegisterBytes)
struct LanesOf<T, N> {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Lanes = typename LanesOf<T, N>::type;

using f32x16 = Lanes<float, 16>;
using i32x16 = Lanes<int32_t, 16>;
using f64x8 = Lanes<double, 8>;
using i64x8 = Lanes<int64_t, 8>;

constexpr int64_t kLanes = 16;

template <typename V>
constexpr bool is_two = false;
template <typename Half>
constexpr bool is_two<Two<Half>> = true;

#define HEADRACE_OPERATOR(op)                                  \
  template <typename Half>                                     \
  HEADRACE_INLINE auto operator op(Two<Half> x, Two<Half> y) { \
    return Two<decltype(x.a op y.a)>{x.a op y.a, x.b op y.b};  \
  }                                                            \
  template <typename Half, typename Scalar>                    \
    requires std::is_arithmetic_v<Scalar>                      \
  HEADRACE_INLINE auto operator op(Two<Half> x, Scalar y) {    \
    return Two<decltype(x.a op y)>{x.a op y, x.b op y};        \
  }
HEADRACE_OPERATOR(+)
HEADRACE_OPERATOR(-)
HEADRACE_OPERATOR(*)
HEADRACE_OPERATOR(/)
HEADRACE_OPERATOR(&)
HEADRACE_OPERATOR(|)
HEADRACE_OPERATOR(<<)
HEADRACE_OPERATOR(>>)
HEADRACE_OPERATOR(<)
HEADRACE_OPERATOR(<=)
HEADRACE_OPERATOR(>)
HEADRACE_OPERATOR(>=)
HEADRACE_OPERATOR(==)
#undef HEADRACE_OPERATOR

template <typename Half>
HEADRACE_INLINE Two<Half> operator-(Two<Half> x) {
  return {-x.a, -x.b};
}

template <typename Half>
HEADRACE_INLINE Two<Half> operator~(Two<Half> x) {
  return {~x.a, ~x.b};
}

template <typename V>
struct LaneType {
  using type = std::remove_cvref_t<decltype(V{}[0])>;
};
template <typename Half>
struct LaneType<Two<Half>> : LaneType<Half> {};
template <typename V>
using Lane = typename LaneType<V>::type;

// x where the mask's lane is set, y elsewhere.
template <typename Mask, typename V>
HEADRACE_INLINE V select(Mask mask, V x, V y) {
  if constexpr (is_two<V>) {
    return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)};
  } else {
    return mask ? x : y;
  }
}

// The same bits as lanes of another type.
template <typename To, typename From>
HEADRACE_INLINE To bits_as(From x) {
  if constexpr (is_two<To>) {
    return {bits_as<decltype(To::a)>(x.a), bits_as<decltype(To::b)>(x.b)};
  } else {
    return (To)x;
  }
}

template <typename To, typename From>
HEADRACE_INLINE To convert(From x) {
  if constexpr (is_two<To>) {
    return {convert<decltype(To::a)>(x.a), convert<decltype(To::b)>(x.b)};
  } else {
    return __builtin_convertvector(x, To);
  }
}

template <typename V, typename T>
HEADRACE_INLINE V spread(T x) {
  if constexpr (is_two<V>) {
    const auto half = spread<decltype(V::a)>(x);
    return {half, half};
  } else {
    return x - V{};  // x, bit for bit, which compilers know; V{} + x is not where x is -0
  }
}

template <typename Register, typename T>
HEADRACE_INLINE Register load_register(const T* p) {
  typedef T Stored __attribute__((vector_size(sizeof(Register) / sizeof(Lane<Register>) * sizeof(T))));
  Stored stored;
  __builtin_memcpy(&stored, p, sizeof stored);
  return __builtin_convertvector(stored, Register);
}

// bf16 is the upper half of an f32. (Of the generic widenings GCC makes several instructions where there is one.)
template <typename Register>
HEADRACE_INLINE Register load_register(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Register)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Register)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return bits_as<Register>(load_register<Lanes<uint32_t, 4>, uint16_t>(p) << 16);
#endif
}

#ifdef __AVX2__
template <typename Register>
HEADRACE_INLINE Register load_register(const int8_t* p) {
#ifdef __AVX512F__
  return (Register)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  return (Register)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
}
#endif

// e4m3 (see headrace.numerics.float8); 480 where it should be NaN, which no cached value is.
template <typename Register>
HEADRACE_INLINE Register load_register(const E4m3* p) {
  using Wide = Lanes<int32_t, sizeof(Register) / sizeof(float)>;
  Wide codes;
#if defined(__AVX512F__)
  codes = (Wide)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  codes = (Wide)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  codes = load_register<Wide>(reinterpret_cast<const uint8_t*>(p));
#endif
  return bits_as<Register>((codes & 0x7F) << 20 | (codes & 0x80) << 24) * 0x1p120f;
}

// As many values as V has lanes, converted to its type.
template <typename V, typename T>
HEADRACE_INLINE V load_lanes(const T* p) {
  if constexpr (is_two<V>) {
    return {load_lanes<decltype(V::a)>(p), load_lanes<decltype(V::b)>(p + sizeof(V) / 2 / sizeof(Lane<V>))};
  } else {
    return load_register<V>(p);
  }
}

template <typename T>
HEADRACE_INLINE f32x16 load(const T* p) {
  return load_lanes<f32x16>(p);
}

template <typename V>
HEADRACE_INLINE void store(Lane<V>* p, V v) {
  if constexpr (is_two<V>) {
    store(p, v.a);
    store(p + sizeof(V) / 2 / sizeof(Lane<V>), v.b);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}

// Lanes of two 16-bit integers each: sixteen pairs of neighbouring 8-bit integers, sign-extended,
template <typename V = i32x16>
HEADRACE_INLINE V load_pairs(const int8_t* p) {
  if constexpr (is_two<V>) {
    return {load_pairs<decltype(V::a)>(p), load_pairs<decltype(V::b)>(p + sizeof(V) / 4)};
  } else {
#if defined(__AVX512F__)
    return (V)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (V)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#elif defined(__SSE2__)
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
    return (V)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#else
    const V both = load_register<V>(reinterpret_cast<const int16_t*>(p));
    return ((both << 24 >> 24) & 0xFFFF) | (both >> 8 << 16);
#endif
  }
}

// or sixteen bytes of two integers in four bits, the first in the lower half.
template <typename V = i32x16>
HEADRACE_INLINE V load_nibble_pairs(const uint8_t* p) {
  if constexpr (is_two<V>) {
    return {load_nibble_pairs<decltype(V::a)>(p), load_nibble_pairs<decltype(V::b)>(p + sizeof(V) / 8)};
  } else {
#if defined(__AVX512F__)
    const V bytes = (V)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    const V bytes = (V)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__SSE2__)
    const __m128i zero = _mm_setzero_si128(), four = _mm_loadu_si32(p);
    const V bytes = (V)_mm_unpacklo_epi16(_mm_unpacklo_epi8(four, zero), zero);
#else
    const V bytes = load_register<V>(p);
#endif
    return (bytes | bytes << 12) & 0x000F000F;
  }
}

// acc + the products of the two 16-bit integers of each lane of a with those of b. Exact while it fits in a lane.
template <typename V>
HEADRACE_INLINE V add_products(V acc, V a, V b) {
  if constexpr (is_two<V>) {
    return {add_products(acc.a, a.a, b.a), add_products(acc.b, a.b, b.b)};
  } else {
#if defined(__AVX512VNNI__)
    return (V)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
    return acc + (V)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return acc + (V)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return acc + (V)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return acc + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  }
}

// a * b + c of floats, rounded once with AVX2 and better: for sums whose bits must not depend on what else the compiler
// has to fuse.
template <typename V>
HEADRACE_INLINE V multiply_add(V a, V b, V c) {
  static_assert(std::is_same_v<Lane<V>, float>);
  if constexpr (is_two<V>) {
    return {multiply_add(a.a, b.a, c.a), multiply_add(a.b, b.b, c.b)};
  } else {
#if defined(__AVX512F__)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
  }
}

// Of sixteen pairs of bf16 the first of each, or the second.
template <int kHalf>
HEADRACE_INLINE f32x16 load_half(const uint16_t* pairs) {
  const i32x16 both = load_lanes<i32x16>(reinterpret_cast<const int32_t*>(pairs));
  return bits_as<f32x16>(kHalf == 0 ? both << 16 : both & static_cast<int32_t>(0xFFFF0000));
}

HEADRACE_INLINE f32x16 to_f32(i32x16 x) { return convert<f32x16>(x); }

// The lower 16 bits of each lane.
template <typename V>
HEADRACE_INLINE void store_low16(int16_t* p, V v) {
  if constexpr (is_two<V>) {
    store_low16(p, v.a);
    store_low16(p + sizeof(V) / 2 / sizeof(int32_t), v.b);
  } else {
    typedef int16_t Stored __attribute__((vector_size(sizeof(V) / 2)));
    const Stored stored = __builtin_convertvector(v, Stored);
    __builtin_memcpy(p, &stored, sizeof stored);
  }
}

// The first n <= 16 values; zeros after them.
template <typename T>
HEADRACE_INLINE Lanes<T, 16> load_part(const T* p, int64_t n) {
  if (n == kLanes) return load_lanes<Lanes<T, 16>>(p);
  Lanes<T, 16> v{};
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}

template <typename T>
HEADRACE_INLINE void store_part(T* p, std::type_identity_t<Lanes<T, 16>> v, int64_t n) {
  if (n == kLanes) return store(p, v);
  __builtin_memcpy(p, &v, n * sizeof(T));
}

HEADRACE_INLINE f32x16 broadcast(float x) { return spread<f32x16>(x); }

HEADRACE_INLINE i32x16 lane_ids() {
  constexpr int32_t kIds[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_lanes<i32x16>(kIds);
}

// b where either is no number. (Of the generic form GCC makes a comparison and a blend.)
template <typename V>
HEADRACE_INLINE V max(V a, V b) {
  if constexpr (is_two<V>) {
    return {max(a.a, b.a), max(a.b, b.b)};
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && std::is_same_v<Lane<V>, float>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
    if constexpr (sizeof(V) == 64 && std::is_same_v<Lane<V>, int>) return (V)_mm512_max_epi32((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32 && std::is_same_v<Lane<V>, float>) return (V)_mm256_max_ps((__m256)a, (__m256)b);
    if constexpr (sizeof(V) == 32 && std::is_same_v<Lane<V>, int>) return (V)_mm256_max_epi32((__m256i)a, (__m256i)b);
    if constexpr (sizeof(V) == 16 && std::is_same_v<Lane<V>, float>) return (V)_mm_max_ps((__m128)a, (__m128)b);
    if constexpr (sizeof(V) == 16 && std::is_same_v<Lane<V>, int>) return (V)_mm_max_epi32((__m128i)a, (__m128i)b);
#endif
    return a > b ? a : b;
  }
}

// Reduce lanes in one fixed order on every machine: halves onto each other.
template <typename V, typename Combine>
HEADRACE_INLINE Lane<V> reduce(V v, Combine combine) {
  if constexpr (is_two<V>) {
    return reduce(combine(v.a, v.b), combine);
  } else if constexpr (sizeof(V) == 64) {
    return reduce(combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                          __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
                  combine);
  } else if constexpr (sizeof(V) == 32) {
    return reduce(combine(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)),
                  combine);
  } else {
    const V two = combine(v, __builtin_shufflevector(v, v, 2, 3, 2, 3));
    return combine(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
  }
}

HEADRACE_INLINE float sum(f32x16 v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
HEADRACE_INLINE float max(f32x16 v) {
  return reduce(v, [](auto a, auto b) { return max(a, b); });
}
HEADRACE_INLINE int32_t max(i32x16 v) {
  return reduce(v, [](auto a, auto b) { return max(a, b); });
}

template <typename V>
HEADRACE_INLINE bool any(V mask) {
  if constexpr (is_two<V>) {
    return any(mask.a | mask.b);
  } else {
    Lane<V> found = 0;
    for (size_t lane = 0; lane < sizeof(V) / sizeof(Lane<V>); ++lane) found |= mask[lane];
    return found != 0;
  }
}

// e^x to 2 ulp. Below -87.3 it is 0 (so e^-inf is); above 88 it stays at e^88. The polynomial is Cephes' expf.
HEADRACE_INLINE f32x16 exp(f32x16 x) {
  constexpr float kLowest = -87.3f, kHighest = 88.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const f32x16 from_below = select(x < kLowest, broadcast(kLowest), x);
  const f32x16 clamped = select(x > kHighest, broadcast(kHighest), from_below);
  const f32x16 rounded = clamped * 1.44269504088896341f + kRound;
  const f32x16 n = rounded - kRound;
  f32x16 r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const i32x16 exponent = (bits_as<i32x16>(rounded) - 0x4B400000 + 127) << 23;
  return select(x < kLowest, f32x16{}, p * bits_as<f32x16>(exponent));
}

// 2^x to 2 ulp, for x <= 0; exactly 1 at 0. Below -127 it is 0 (so 2^-inf is); a NaN stays one. The polynomial is the
// best of its degree for 2^r, |r| <= 1/2.
HEADRACE_INLINE f32x16 exp2(f32x16 x) {
  constexpr float kRound = 12582912.0f + 127.0f;  // see exp; with the exponent's bias
  const f32x16 clamped = max(broadcast(-127.0f), x);
  const f32x16 rounded = clamped + kRound;
  const f32x16 r = clamped - (rounded - kRound);
  f32x16 p = r * 1.3264727e-3f + 9.671513e-3f;
  p = p * r + 5.5507336e-2f;
  p = p * r + 0.24022242f;
  p = p * r + 0.693147f;
  p = p * r + 1.0f;
  return p * bits_as<f32x16>(bits_as<i32x16>(rounded) << 23);
}

// e^x to about 1 ulp, for x <= 0. Below -708 it is 0. Taylor's series to r^13, |r| <= ln(2) / 2.
HEADRACE_INLINE f64x8 exp(f64x8 x) {
  constexpr double kLowest = -708.0;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  constexpr double kSeries[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  const f64x8 clamped = select(x < kLowest, spread<f64x8>(kLowest), x);
  const f64x8 rounded = clamped * 1.4426950408889634074 + kRound;
  const f64x8 n = rounded - kRound;
  f64x8 r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  f64x8 p = spread<f64x8>(kSeries[13]);
#pragma GCC unroll 16
  for (int i = 12; i >= 0; --i) p = p * r + kSeries[i];
  const i64x8 exponent = (bits_as<i64x8>(rounded) - int64_t{0x4338000000000000} + int64_t{1023}) << 52;
  return select(x < kLowest, f64x8{}, p * bits_as<f64x8>(exponent));
}

// To bf16, to nearest, ties to even; a NaN stays one.
HEADRACE_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// The same of each lane, in its lower half.
HEADRACE_INLINE i32x16 to_bf16(f32x16 x) {
  const i32x16 bits = bits_as<i32x16>(x), odd = bits >> 16 & 1;
  const i32x16 nearest = (bits + 0x7FFF + odd) >> 16 & 0xFFFF, cut = (bits >> 16 & 0xFFFF) | 0x40;
  return select((bits & 0x7FFFFFFF) > 0x7F800000, cut, nearest);
}

HEADRACE_INLINE float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// To e4m3, likewise; what is larger than 448 becomes 448. Not of a NaN.
HEADRACE_INLINE E4m3 to_e4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), all = bits & 0x7FFFFFFFu;
  const uint32_t magnitude = all < 0x43E00000u ? all : 0x43E00000u;  // 448
  uint32_t code;
  if (magnitude < 0x3C800000u) {  // 2^-6: a multiple of 2^-9
    code = static_cast<uint32_t>(std::bit_cast<float>(magnitude) * 512.0f + 12582912.0f - 12582912.0f);
  } else {
    code = ((magnitude + (0x7FFFFu + (magnitude >> 20 & 1u))) >> 20) - (120u << 3);
  }
  return {static_cast<uint8_t>(code | (bits >> 24 & 0x80u))};
}

}  // namespace
}  // namespace headrace
