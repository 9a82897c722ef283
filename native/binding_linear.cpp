// Linear layers by themselves: their size, for whoever plans memory; and their tests (tests/unit/native) and benchmark
// (headrace bench kernels).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "formats.h"
#include "isa.h"
#include "linear.h"
#include "pages.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace headrace;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::numpy, nb::device::cpu, nb::c_contig, nb::ndim<2>>;
using Floats = nb::ndarray<const float, nb::numpy, nb::device::cpu, nb::c_contig, nb::ndim<2>>;

WeightView view_of(const std::string& format, const Bytes& raw, int64_t in_features) {
  return {format_named(format), raw.data(), static_cast<int64_t>(raw.shape(0)), in_features,
          static_cast<int64_t>(raw.shape(1))};
}

std::unique_ptr<Linear> allocate(const WeightView& w, const std::string& isa, const std::string& activation) {
  auto linear = make_linear(w.format, w.out_features, w.in_features, choose_isa(isa),
                            choose_activation(activation, choose_isa(isa)));
  const FormatTraits& t = traits(w.format);
  if (w.row_bytes != w.in_features / t.block * t.block_bytes) throw std::invalid_argument("rows of the wrong length");
  return linear;
}

// Columns of this thread's share, in whole tiles.
std::pair<int64_t, int64_t> share(const Linear& linear, int worker, int workers) {
  const int64_t tiles = (linear.out_features + linear.column_tile - 1) / linear.column_tile;
  return {tiles * worker / workers * linear.column_tile,
          std::min(linear.out_features, tiles * (worker + 1) / workers * linear.column_tile)};
}

nb::object array_of(std::unique_ptr<float[]> values, size_t rows, size_t columns) {
  float* data = values.release();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(data, {rows, columns}, owner));
}

// y [rows, out]; columns outside [column_begin, column_end) are NaN. Inputs are prepared in odd ranges, the last one
// first, into memory that holds NaNs, so that a kernel that reads what it must not shows.
nb::object linear_test(const std::string& format, const Bytes& raw, const Floats& x, const std::string& isa,
                       const std::string& activation, int64_t column_begin, int64_t column_end) {
  const int64_t rows = x.shape(0), in_features = x.shape(1);
  const WeightView w = view_of(format, raw, in_features);
  const auto linear = allocate(w, isa, activation);
  if (column_end < 0) column_end = w.out_features;
  if (column_begin < 0 || column_begin % linear->column_tile != 0 || column_end > w.out_features) {
    throw std::invalid_argument("not a range of column tiles");
  }
  const Pages memory(linear->packed_bytes);
  linear->place(memory.data());
  linear->pack(w, 0, w.out_features);
  const size_t bytes = prepared_bytes(linear->form, rows, in_features);
  const Pages prepared(bytes);
  std::fill_n(prepared.data(), bytes, uint8_t{0xff});
  constexpr int64_t kRange = 3;
  for (int64_t begin = (rows - 1) / kRange * kRange; begin >= 0; begin -= kRange) {
    prepare(linear->form, x.data(), in_features, rows, in_features, prepared.data(), begin,
            std::min(rows, begin + kRange));
  }
  auto y = std::make_unique<float[]>(rows * w.out_features);
  std::fill_n(y.get(), rows * w.out_features, __builtin_nanf(""));
  linear->run(prepared.data(), rows, y.get(), w.out_features, column_begin, column_end);
  return array_of(std::move(y), rows, w.out_features);
}

nb::object decode_rows(const std::string& format, const Bytes& raw, int64_t features) {
  const WeightView w = view_of(format, raw, features);
  const FormatTraits& t = traits(w.format);
  if (features % t.block != 0 || w.row_bytes != features / t.block * t.block_bytes) {
    throw std::invalid_argument("rows of the wrong length");
  }
  auto out = std::make_unique<float[]>(w.out_features * features);
  for (int64_t n = 0; n < w.out_features; ++n) {
    decode_row(w.format, w.data + n * w.row_bytes, features, out.get() + n * features);
  }
  return array_of(std::move(out), w.out_features, features);
}

// Least seconds of one run, over `repeats` rounds through `copies` packed copies of the weight (enough of them and each
// run reads its weight from beyond L2); with the conversion of inputs apart.
nb::dict linear_benchmark(const std::string& format, const Bytes& raw, const Floats& x, const std::string& isa,
                          const std::string& activation, int threads, int copies, int repeats) {
  using Clock = std::chrono::steady_clock;
  const int64_t rows = x.shape(0), in_features = x.shape(1);
  const WeightView w = view_of(format, raw, in_features);
  ThreadPool pool(threads);
  std::vector<std::unique_ptr<Linear>> linears;
  double pack = 1e9, prepared_in = 1e9, run = 1e9;
  const auto timed = [](double& best, Clock::time_point start) {
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  };
  Pages memory;
  for (int i = 0; i < copies; ++i) {
    linears.push_back(allocate(w, isa, activation));
    const size_t bytes = (linears.back()->packed_bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
    if (i == 0) memory = Pages(bytes * copies);  // one piece, as a model's weights are
    linears.back()->place(memory.data() + i * bytes);
    const auto start = Clock::now();
    pool.parallel_for(threads, [&](int64_t worker) {
      const auto [begin, end] = share(*linears[i], static_cast<int>(worker), threads);
      if (begin < end) linears[i]->pack(w, begin, end);
    });
    timed(pack, start);
  }
  const Linear& first = *linears[0];
  const Pages prepared(prepared_bytes(first.form, rows, in_features));
  const Pages results(rows * w.out_features * sizeof(float));
  auto* y = reinterpret_cast<float*>(results.data());
  for (int repeat = 0; repeat < repeats; ++repeat) {
    auto start = Clock::now();
    pool.parallel_for(threads, [&](int64_t worker) {
      prepare(first.form, x.data(), in_features, rows, in_features, prepared.data(), rows * worker / threads,
              rows * (worker + 1) / threads);
    });
    timed(prepared_in, start);
    for (const auto& linear : linears) {
      start = Clock::now();
      pool.parallel_for(threads, [&](int64_t worker) {
        const auto [begin, end] = share(*linear, static_cast<int>(worker), threads);
        if (begin < end) linear->run(prepared.data(), rows, y, w.out_features, begin, end);
      });
      timed(run, start);
    }
  }
  nb::dict d;
  d["kernel"] = first.kernel;
  d["packed_bytes"] = first.packed_bytes;
  d["pack_seconds"] = pack;
  d["prepare_seconds"] = prepared_in;
  d["run_seconds"] = run;
  return d;
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def(
      "packed_bytes",
      [](const std::string& format, int64_t out_features, int64_t in_features, const std::string& isa,
         const std::string& activation) {
        return make_linear(format_named(format), out_features, in_features, choose_isa(isa),
                           choose_activation(activation, choose_isa(isa)))
            ->packed_bytes;
      },
      "format"_a, "out_features"_a, "in_features"_a, "isa"_a, "activation"_a);
  m.def("decode_rows", &decode_rows, "format"_a, "raw"_a, "features"_a);
  m.def("linear_test", &linear_test, "format"_a, "raw"_a, "x"_a, "isa"_a, "activation"_a = "f32", "column_begin"_a = 0,
        "column_end"_a = -1);
  m.def("linear_benchmark", &linear_benchmark, "format"_a, "raw"_a, "x"_a, "isa"_a, "activation"_a, "threads"_a,
        "copies"_a, "repeats"_a);
}
