// Norms, rotations, activations, sums and the sampler's scans. Compiled once per instruction set (see vectors.h).
#include "kernel_table.h"
#include "vectors.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

f32x16 silu(f32x16 x) { return x / (exp(-x) + 1.0f); }

// x * (1 + tanh(u)) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
f32x16 gelu_tanh(f32x16 x) {
  const f32x16 u = (x * x * x * 0.044715f + x) * 0.7978845608028654f;
  return x / (exp(u * -2.0f) + 1.0f);
}

template <typename Function>
void map2(const float* a, const float* b, int64_t n, float* y, Function function) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, function(load(a + i), load(b + i)));
  if (i < n) store_part(y + i, function(load_part(a + i, n - i), load_part(b + i, n - i)), n - i);
}

float sum_of_squares(const float* x, int64_t n) {
  f32x16 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const f32x16 v = load(x + i + j * kLanes);
      sums[j] = v * v + sums[j];
    }
  }
  for (; i < n; i += kLanes) {
    const f32x16 v = n - i >= kLanes ? load(x + i) : load_part(x + i, n - i);
    sums[0] = v * v + sums[0];
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The peak goes first: a tiny temperature may then send all but the largest to -infinity, never the largest to NaN.
template <typename T>
double exp_all(const T* x, int64_t n, double peak, double temperature, double* weights) {
  typedef T Eight __attribute__((vector_size(8 * sizeof(T))));
  const auto scaled = [&](Eight v) { return (__builtin_convertvector(v, f64x8) - peak) / temperature; };
  f64x8 sums = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const f64x8 w = exp(scaled(load_as<Eight>(x + i)));
    __builtin_memcpy(weights + i, &w, sizeof w);
    sums += w;
  }
  double total = 0;
  for (int lane = 0; lane < 8; ++lane) total += sums[lane];
  if (i < n) {
    Eight rest = {};
    __builtin_memcpy(&rest, x + i, (n - i) * sizeof(T));
    const f64x8 w = exp(scaled(rest));
    __builtin_memcpy(weights + i, &w, (n - i) * sizeof(double));
    for (; i < n; ++i) total += weights[i];
  }
  return total;
}

}  // namespace

void rms_norm(const float* x, int64_t features, int64_t group, const float* weight, float eps, float* y) {
  for (int64_t begin = 0; begin < features; begin += group) {
    const float mean = sum_of_squares(x + begin, group) / static_cast<float>(group);
    const float factor = 1.0f / __builtin_sqrtf(mean + eps);
    map2(x + begin, weight, group, y + begin, [factor](f32x16 v, f32x16 w) { return v * factor * w; });
  }
}

void rope(const float* x, int64_t heads, int64_t head_dim, int64_t rotary_dim, const float* cos, const float* sin,
          float* y) {
  const int64_t half = rotary_dim / 2;
  for (int64_t head = 0; head < heads; ++head, x += head_dim, y += head_dim) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const f32x16 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
      store(y + i, a * c - b * s);
      store(y + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      y[i] = a * cos[i] - b * sin[i];
      y[half + i] = b * cos[i] + a * sin[i];
    }
    for (i = rotary_dim; i < head_dim; ++i) y[i] = x[i];
  }
}

void glu(GluActivation activation, const float* gate, const float* up, int64_t n, float* y) {
  if (activation == GluActivation::silu) {
    map2(gate, up, n, y, [](f32x16 g, f32x16 u) { return silu(g) * u; });
  } else {
    map2(gate, up, n, y, [](f32x16 g, f32x16 u) { return gelu_tanh(g) * u; });
  }
}

void add(const float* a, const float* b, int64_t n, float* y) {
  map2(a, b, n, y, [](f32x16 u, f32x16 v) { return u + v; });
}

void scale(float* x, int64_t n, float factor) {
  map2(x, x, n, x, [factor](f32x16 v, f32x16) { return v * factor; });
}

Peak peak(const float* x, int64_t n) {
  constexpr float kMax = 3.402823466e+38f, kInfinity = __builtin_inff();
  f32x16 best = broadcast(-kInfinity);
  i32x16 where = {}, bad = {}, ids = kLaneIds;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes, ids += kLanes) {
    const f32x16 v = load(x + i);
    const i32x16 better = v > best;
    best = better ? v : best;
    where = better ? ids : where;
    bad |= ~(v <= kMax);
  }
  Peak found{-kInfinity, 0, true};
  for (int lane = 0; lane < kLanes; ++lane) {
    found.finite &= bad[lane] == 0;
    if (best[lane] > found.value || (best[lane] == found.value && where[lane] < found.index)) {
      found.value = best[lane];
      found.index = where[lane];
    }
  }
  for (; i < n; ++i) {
    found.finite &= x[i] <= kMax;
    if (x[i] > found.value) {
      found.value = x[i];
      found.index = static_cast<int32_t>(i);
    }
  }
  found.finite &= found.value > -kInfinity;
  return found;
}

double sum_exp(const float* x, int64_t n, double shift) {
  f64x8 sums = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) sums += exp(__builtin_convertvector(load_as<f32x8>(x + i), f64x8) - shift);
  if (i < n) {
    f64x8 rest = f64x8{} - __builtin_inf();
    for (int64_t j = 0; j < n - i; ++j) rest[j] = static_cast<double>(x[i + j]) - shift;
    sums += exp(rest);
  }
  double total = 0;
  for (int lane = 0; lane < 8; ++lane) total += sums[lane];
  return total;
}

double exp_weights(const float* x, int64_t n, double peak, double temperature, double* weights) {
  return exp_all(x, n, peak, temperature, weights);
}

double exp_weights_f64(const double* x, int64_t n, double peak, double temperature, double* weights) {
  return exp_all(x, n, peak, temperature, weights);
}

int64_t places_at_least(const double* weights, int64_t n, double lowest, int32_t* places) {
  int64_t count = 0;
  const auto look = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (weights[i] >= lowest) places[count++] = static_cast<int32_t>(i);
    }
  };
  constexpr int64_t kRun = 32;  // few weights are likely: most runs have none, which four comparisons tell
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    const double* w = weights + i;
    const i64x8 found = (load_as<f64x8>(w) >= lowest) | (load_as<f64x8>(w + 8) >= lowest) |
                        (load_as<f64x8>(w + 16) >= lowest) | (load_as<f64x8>(w + 24) >= lowest);
    int64_t any = 0;
    for (int lane = 0; lane < 8; ++lane) any |= found[lane];
    if (any != 0) look(i, i + kRun);
  }
  look(i, n);
  return count;
}

}  // namespace headrace::HEADRACE_KERNELS
