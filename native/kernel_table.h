// What each instruction set's copy of `*_kernels.cpp` offers.
#pragma once

#include "kernels.h"

#define HEADRACE_DECLARE_KERNELS(isa)                                                                 \
  namespace headrace::isa {                                                                           \
  void rms_norm(const float*, int64_t, int64_t, const float*, float, float*);                         \
  void rope(const float*, int64_t, int64_t, int64_t, const float*, const float*, float*);             \
  void glu(GluActivation, const float*, const float*, int64_t, float*);                               \
  void add(const float*, const float*, int64_t, float*);                                              \
  void scale(float*, int64_t, float);                                                                 \
  void write_kv(const AttentionShape&, const KvLayer&, int32_t, int32_t, const float*, const float*); \
  void attend(const AttentionShape&, const KvLayer&, const AttentionTask&, float*);                   \
  void attend_integers(const AttentionShape&, const KvLayer&, const AttentionTask&, float*);          \
  void join(const float*, int64_t, int64_t, int32_t, float*, float*);                                 \
  Peak peak(const float*, int64_t);                                                                   \
  double sum_exp(const float*, int64_t, double);                                                      \
  double exp_weights(const float*, int64_t, double, double, double*);                                 \
  double exp_weights_f64(const double*, int64_t, double, double, double*);                            \
  int64_t places_at_least(const double*, int64_t, double, int32_t*);                                  \
  void quantize_bf16(const IntegerGroups&, const uint16_t*, int64_t, uint8_t*);                       \
  void quantize_f32(const IntegerGroups&, const float*, int64_t, uint8_t*);                           \
  inline Kernels make_kernels() {                                                                     \
    return {rms_norm,        rope,          glu,         add,     scale,       write_kv,              \
            attend,          join,          peak,        sum_exp, exp_weights, exp_weights_f64,       \
            places_at_least, quantize_bf16, quantize_f32};                                            \
  }                                                                                                   \
  }

HEADRACE_DECLARE_KERNELS(portable)
HEADRACE_DECLARE_KERNELS(avx2)
HEADRACE_DECLARE_KERNELS(avx512)
HEADRACE_DECLARE_KERNELS(avx512_vnni)

namespace headrace::amx {
using avx512_vnni::rope;             // to turn queries by
constexpr int32_t kMaxQueries = 96;  // whole tiles of 16
void attend(const AttentionShape&, const KvLayer&, const AttentionTask&, float*);
void attend_bytes(const AttentionShape&, const KvLayer&, const AttentionTask&, float*);  // int8, read in place
}  // namespace headrace::amx
