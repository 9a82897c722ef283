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

double in_order(f64x8 v) {
  double lanes[8], total = 0;
  store(lanes, v);
  for (double lane : lanes) total += lane;
  return total;
}

// The peak goes first: a tiny temperature may then send all but the largest to -infinity, never the largest to NaN.
template <typename T>
double exp_all(const T* x, int64_t n, double peak, double temperature, double* weights) {
  const auto weight = [&](const T* eight) { return exp((load_lanes<f64x8>(eight) - peak) / temperature); };
  f64x8 sums = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const f64x8 w = weight(x + i);
    store(weights + i, w);
    sums = sums + w;
  }
  double total = in_order(sums);
  if (i < n) {
    T rest[8] = {};
    __builtin_memcpy(rest, x + i, (n - i) * sizeof(T));
    const f64x8 w = weight(rest);
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
  i32x16 where = {}, bad = {}, ids = lane_ids();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes, ids = ids + static_cast<int32_t>(kLanes)) {
    const f32x16 v = load(x + i);
    const i32x16 better = v > best;
    best = select(better, v, best);
    where = select(better, ids, where);
    bad = bad | ~(v <= kMax);
  }
  Peak found;
  found.damaged = any(bad);
  float values[kLanes];
  int32_t places[kLanes];
  store(values, best);
  store(places, where);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (values[lane] > found.value || (values[lane] == found.value && places[lane] < found.index)) {
      found.value = values[lane];
      found.index = places[lane];
    }
  }
  for (; i < n; ++i) {
    found.damaged |= !(x[i] <= kMax);
    if (x[i] > found.value) {
      found.value = x[i];
      found.index = static_cast<int32_t>(i);
    }
  }
  return found;
}

double sum_exp(const float* x, int64_t n, double shift) {
  f64x8 sums = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) sums = sums + exp(load_lanes<f64x8>(x + i) - shift);
  if (i < n) {
    float rest[8];
    for (int64_t j = 0; j < 8; ++j) rest[j] = i + j < n ? x[i + j] : -__builtin_inff();
    sums = sums + exp(load_lanes<f64x8>(rest) - shift);
  }
  return in_order(sums);
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
    const auto likely = [&](int64_t j) { return load_lanes<f64x8>(w + j) >= lowest; };
    if (any(likely(0) | likely(8) | likely(16) | likely(24))) look(i, i + kRun);
  }
  look(i, n);
  return count;
}

}  // namespace headrace::HEADRACE_KERNELS
