// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq.
namespace headrace {
namespace {
constexpr int kRows = 4, kPanels = 4, kDirect = 8;
}  // namespace
}  // namespace headrace

#include "linear_f32.inc"

void headrace::linear_f32_avx512(const PanelWeights& weights, const float* x, int64_t rows, float* y, int64_t ldy,
                                 int64_t column_begin, int64_t column_end) {
  run(weights, x, rows, y, ldy, column_begin, column_end);
}
