// Python's view of the native executor: module `headrace._native`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bandwidth.h"
#include "cores.h"
#include "formats.h"
#include "isa.h"
#include "peak.h"
#include "plan.h"
#include "runtime.h"
#include "staged_weights.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace headrace;

void bind_files(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_quantize(nb::module_& m);

namespace {

template <typename T, typename... Shape>
using Array = nb::ndarray<const T, nb::numpy, nb::device::cpu, nb::c_contig, Shape...>;
template <typename T, typename... Shape>
using OutArray = nb::ndarray<T, nb::numpy, nb::device::cpu, nb::c_contig, Shape...>;
using Bytes = Array<uint8_t, nb::ndim<2>>;

// A stored matrix: [rows, bytes per row], which must hold `features` values a row.
void check_matrix(Format format, const Bytes& data, int64_t features) {
  const FormatTraits& t = traits(format);
  if (features % t.block != 0 || static_cast<int64_t>(data.shape(1)) != features / t.block * t.block_bytes) {
    throw std::invalid_argument(std::string(t.name) + " rows of " + std::to_string(features) + " values do not take " +
                                std::to_string(data.shape(1)) + " bytes");
  }
}

WeightView weight_of(const std::string& format, const Bytes& data, int64_t features, int64_t interleaved_heads) {
  const Format f = format_named(format);
  check_matrix(f, data, features);
  const int64_t rows = data.shape(0);
  if (interleaved_heads < 0 || (interleaved_heads > 0 && rows % (2 * interleaved_heads) != 0)) {
    throw std::invalid_argument("the rows are not those of heads of pairs");
  }
  return {f, data.data(), rows, features, static_cast<int64_t>(data.shape(1))};
}

Table table_of(const std::string& format, const Bytes& data, int64_t features) {
  const Format f = format_named(format);
  check_matrix(f, data, features);
  return {f, data.data(), static_cast<int64_t>(data.shape(0)), features, static_cast<int64_t>(data.shape(1))};
}

// The sampling of a step as flat arrays: numbers [R, 6] and [R, 4], and four ragged lists of ids side by side.
struct Sampling {
  Array<double, nb::shape<-1, 6>> numbers;    // temperature, top_p, min_p, repetition, presence, frequency
  Array<int64_t, nb::shape<-1, 4>> integers;  // seed, index, top_k, logprobs or -1
  Array<int32_t, nb::ndim<1>> ids;            // of each row in turn: bias, banned, prompt, output
  Array<int64_t, nb::ndim<1>> ends;           // [4 R + 1], where each of those lists ends
  Array<double, nb::ndim<1>> bias;            // of the bias ids, all rows one after the other
};

bool in_range(const double* x, const int64_t* n) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return std::all_of(x, x + 6, [](double value) { return std::isfinite(value); }) && x[0] >= 0 && x[3] > 0 &&
         n[2] >= 0 && n[2] <= kMost && n[3] >= -1 && n[3] <= kMost;
}

void fill_specs(const Sampling& s, int32_t rows, int32_t vocab_size, std::vector<SampleSpec>& specs) {
  const bool fits = static_cast<int32_t>(s.numbers.shape(0)) == rows &&
                    static_cast<int32_t>(s.integers.shape(0)) == rows &&
                    static_cast<int64_t>(s.ends.shape(0)) == 4 * int64_t{rows} + 1 && s.ends.data()[0] == 0 &&
                    s.ends.data()[4 * int64_t{rows}] == static_cast<int64_t>(s.ids.shape(0));
  if (!fits) throw std::invalid_argument("sampling arrays do not match the sampled rows");
  for (size_t i = 0; i < s.ids.shape(0); ++i) {
    if (s.ids.data()[i] < 0 || s.ids.data()[i] >= vocab_size) {
      throw std::invalid_argument("sampling names token " + std::to_string(s.ids.data()[i]) +
                                  ", outside the vocabulary of " + std::to_string(vocab_size));
    }
  }
  specs.clear();
  int64_t biases = 0;
  const int64_t all_biases = s.bias.shape(0);
  for (int32_t r = 0; r < rows; ++r) {
    const double* x = s.numbers.data() + 6 * r;
    const int64_t* n = s.integers.data() + 4 * r;
    if (!in_range(x, n))
      throw std::invalid_argument("sampling numbers of row " + std::to_string(r) + " are impossible");
    Ids lists[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t begin = s.ends.data()[4 * r + i], end = s.ends.data()[4 * r + i + 1];
      if (begin > end) throw std::invalid_argument("sampling lists overlap");
      lists[i] = {s.ids.data() + begin, end - begin};
    }
    specs.push_back({x[0], x[1], x[2], x[3], x[4], x[5], n[0], n[1], static_cast<int32_t>(n[2]),
                     static_cast<int32_t>(n[3]), lists[0], lists[1], lists[2], lists[3], s.bias.data() + biases});
    biases += lists[0].size;
    if (biases > all_biases) break;
  }
  if (biases != all_biases) throw std::invalid_argument("sampling biases do not match their tokens");
}

// Where the sampled rows' results go.
struct Results {
  OutArray<int32_t, nb::ndim<1>> tokens;
  OutArray<float, nb::ndim<1>> logprobs;
  OutArray<int32_t, nb::ndim<2>> top_ids;
  OutArray<float, nb::ndim<2>> top_logprobs;
  OutArray<int32_t, nb::ndim<1>> status;
};

void fill_outputs(const Results& out, const std::vector<SampleSpec>& specs, std::vector<SampleOutput>& outputs) {
  const size_t rows = specs.size(), top = out.top_ids.shape(1);
  if (out.tokens.shape(0) != rows || out.logprobs.shape(0) != rows || out.top_ids.shape(0) != rows ||
      out.top_logprobs.shape(0) != rows || out.top_logprobs.shape(1) != top || out.status.shape(0) != rows) {
    throw std::invalid_argument("result arrays do not match the sampled rows");
  }
  outputs.clear();
  for (size_t r = 0; r < rows; ++r) {
    if (specs[r].logprobs > static_cast<int64_t>(top)) throw std::invalid_argument("no room for the top logprobs");
    outputs.push_back({out.tokens.data() + r, out.logprobs.data() + r, out.top_ids.data() + r * top,
                       out.top_logprobs.data() + r * top, reinterpret_cast<SampleStatus*>(out.status.data() + r)});
  }
}

Step step_of(const Array<int32_t, nb::ndim<1>>& token_ids, const Array<int32_t, nb::ndim<1>>& positions,
             const Array<int32_t, nb::ndim<1>>& seq_starts, const Array<int32_t, nb::ndim<1>>& context_lens,
             const Array<int32_t, nb::ndim<2>>& block_tables, const Array<int32_t, nb::ndim<1>>& sample_rows) {
  const size_t seqs = context_lens.shape(0);
  if (positions.shape(0) != token_ids.shape(0)) throw std::invalid_argument("positions do not match the token ids");
  if (seq_starts.shape(0) != seqs + 1 || block_tables.shape(0) != seqs) {
    throw std::invalid_argument("seq_starts, context_lens and block_tables disagree about the number of sequences");
  }
  return {token_ids.data(),
          positions.data(),
          seq_starts.data(),
          context_lens.data(),
          block_tables.data(),
          sample_rows.data(),
          static_cast<int32_t>(token_ids.shape(0)),
          static_cast<int32_t>(seqs),
          static_cast<int32_t>(sample_rows.shape(0)),
          static_cast<int32_t>(block_tables.shape(1))};
}

AttentionShape shape_of(const Runtime& runtime, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
                        int32_t window, float scale) {
  return {num_heads, num_kv_heads, head_dim, runtime.cache.block_size, window, scale, runtime.cache.format};
}

KvFormat kv_format_named(const std::string& name) {
  constexpr std::pair<const char*, KvFormat> kNames[] = {{"f32", KvFormat::f32},
                                                         {"bf16", KvFormat::bf16},
                                                         {"fp8", KvFormat::fp8},
                                                         {"int8", KvFormat::int8},
                                                         {"int4", KvFormat::int4}};
  for (const auto& [known, format] : kNames) {
    if (name == known) return format;
  }
  throw std::invalid_argument("'" + name + "' is no format of cached keys and values");
}

nb::dict describe(const Runtime& runtime, int linear) {
  const Linear& l = runtime.linear(linear);
  nb::dict d;
  d["kernel"] = l.kernel;
  d["out_features"] = l.out_features;
  d["in_features"] = l.in_features;
  d["packed_bytes"] = l.packed_bytes;
  return d;
}

nb::dict profile_of(const Plan& plan) {
  nb::dict d;
  for (int kind = 0; kind < kNumOpKinds; ++kind) {
    const OpProfile& p = plan.profile()[kind];
    if (p.runs > 0) d[op_kind_name(static_cast<OpKind>(kind))] = nb::make_tuple(p.seconds, p.runs);
  }
  return d;
}

nb::object read_rows(Plan& plan, const View& view, int64_t rows) {
  const int64_t limit =
      view.rows == Rows::tokens ? plan.runtime().limits.max_tokens : plan.runtime().limits.max_sampled;
  if (rows < 0 || rows > limit) throw std::invalid_argument("more rows than the view has");
  float* copy = new float[rows * view.features];
  nb::capsule owner(copy, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* source = plan.runtime().arena() + view.begin + sizeof(float) * (row * view.ld + view.column);
    std::memcpy(copy + row * view.features, source, sizeof(float) * view.features);
  }
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(
      copy, {static_cast<size_t>(rows), static_cast<size_t>(view.features)}, owner));
}

// What was packed, as bytes that stay what they are: an exchange of weights does not take them away from who reads
// them.
nb::object pack(Runtime& runtime) {
  using Shared = std::shared_ptr<const Pages>;
  std::unique_ptr<Shared> pages;
  {
    const nb::gil_scoped_release release;
    pages = std::make_unique<Shared>(runtime.pack());
  }
  const Pages& packed = **pages;
  nb::capsule owner(pages.get(), [](void* kept) noexcept { delete static_cast<Shared*>(kept); });
  static_cast<void>(pages.release());
  return nb::cast(nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(packed.data(), {packed.size()}, owner));
}

void bind_runtime(nb::module_& m) {
  nb::class_<Runtime>(m, "Runtime")
      .def(
          "__init__",
          [](Runtime* self, int num_threads, const std::string& isa, const std::string& activation, int32_t max_tokens,
             int32_t max_sampled, int32_t max_positions, int32_t vocab_size, int32_t num_blocks, int32_t block_size,
             const std::string& kv_format) {
            new (self) Runtime(num_threads, choose_isa(isa), choose_activation(activation, choose_isa(isa)),
                               {max_tokens, max_sampled, max_positions, vocab_size},
                               {num_blocks, block_size, kv_format_named(kv_format)});
          },
          nb::kw_only(), "num_threads"_a, "isa"_a, "activation"_a, "max_tokens"_a, "max_sampled"_a, "max_positions"_a,
          "vocab_size"_a, "num_blocks"_a, "block_size"_a, "kv_format"_a)
      .def(
          "add_linear",
          [](Runtime& self, const std::string& format, const Bytes& data, int64_t in_features, bool mapped,
             int64_t interleaved_heads) {
            const WeightView weight = weight_of(format, data, in_features, interleaved_heads);
            return self.add_linear(weight, mapped, interleaved_heads);
          },
          "format"_a, "data"_a, "in_features"_a, "mapped"_a = false, "interleaved_heads"_a = 0)
      .def(
          "add_table",
          [](Runtime& self, const std::string& format, const Bytes& data, int64_t features) {
            const Table table = table_of(format, data, features);
            if (table.rows < self.limits.vocab_size) {
              throw std::invalid_argument("an embedding table has fewer rows than the vocabulary");
            }
            return self.add_table(table);
          },
          nb::keep_alive<1, 3>())
      .def("add_vector",
           [](Runtime& self, const Array<float, nb::ndim<1>>& x) { return self.add_vector(x.data(), x.shape(0)); })
      .def("add_rotation", &Runtime::add_rotation, nb::call_guard<nb::gil_scoped_release>())
      .def("reserve_kv", &Runtime::reserve_kv, "layers"_a)
      .def("pack", &pack)
      .def("read_packed", &Runtime::read_packed, "fd"_a, "offset"_a, "piece"_a, "expected"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("pending_bytes", &Runtime::pending_bytes)
      .def("reserve_arena", [](Runtime& self, size_t bytes) { self.reserve_arena(bytes); })
      .def("describe_linear", &describe)
      .def("input_form",
           [](const Runtime& self, int linear) {
             const InputForm& f = self.linear(linear).form;
             return std::make_tuple(static_cast<int>(f.isa), static_cast<int>(f.activation), f.group, f.layout);
           })
      .def("prepared_bytes",
           [](const Runtime& self, int linear, int64_t rows) {
             return prepared_bytes(self.linear(linear).form, rows, self.linear(linear).in_features);
           })
      .def_prop_ro("num_threads", [](const Runtime& self) { return self.pool.size(); })
      .def_prop_ro("isa", [](const Runtime& self) { return isa_name(self.isa); })
      .def_prop_ro("activation", [](const Runtime& self) { return activation_name(self.activation); })
      .def_prop_ro("packed_bytes", &Runtime::packed_bytes)
      .def_prop_ro("kv_bytes", &Runtime::kv_bytes)
      .def_prop_ro("arena_bytes", &Runtime::arena_bytes);
}

void bind_staged_weights(nb::module_& m) {
  nb::class_<StagedWeights>(m, "StagedWeights")
      .def(nb::init<const Runtime&>(), nb::keep_alive<1, 2>())
      .def(
          "set_linear",
          [](StagedWeights& self, int i, const std::string& format, const Bytes& data, int64_t in_features,
             int64_t interleaved_heads) {
            const WeightView weight = weight_of(format, data, in_features, interleaved_heads);
            const nb::gil_scoped_release release;
            self.set_linear(i, weight, interleaved_heads);
          },
          "linear"_a, "format"_a, "data"_a, "in_features"_a, "interleaved_heads"_a = 0)
      .def(
          "set_table",
          [](StagedWeights& self, int i, const std::string& format, const Bytes& data, int64_t features) {
            self.set_table(i, table_of(format, data, features));
          },
          "table"_a, "format"_a, "data"_a, "features"_a)
      .def(
          "set_vector",
          [](StagedWeights& self, int i, const Array<float, nb::ndim<1>>& x) {
            self.set_vector(i, x.data(), x.shape(0));
          },
          "vector"_a, "data"_a)
      .def("exchange", &StagedWeights::exchange, "runtime"_a);
}

GluActivation glu_named(const std::string& name) {
  return name == "silu" ? GluActivation::silu : GluActivation::gelu_tanh;
}

void bind_plan(nb::module_& m) {
  nb::class_<View>(m, "View").def(
      "__init__",
      [](View* self, int64_t begin, int64_t end, int32_t ld, int32_t column, int32_t features, bool sampled) {
        new (self) View{begin, end, ld, column, features, sampled ? Rows::sampled : Rows::tokens};
      },
      nb::kw_only(), "begin"_a, "end"_a, "ld"_a, "column"_a, "features"_a, "sampled"_a);
  nb::class_<Plan>(m, "Plan")
      .def(nb::init<Runtime&>(), nb::keep_alive<1, 2>())
      .def("embed", &Plan::embed, "table"_a, "scale"_a, "out"_a)
      .def("rms_norm", &Plan::rms_norm, "x"_a, "weight"_a, "group"_a, "eps"_a, "out"_a)
      .def(
          "prepare",
          [](Plan& self, const View& x, int linear, int64_t begin, int64_t end) {
            self.prepare(x, linear, {begin, end});
          },
          "x"_a, "linear"_a, "begin"_a, "end"_a)
      .def(
          "norm_prepare",
          [](Plan& self, const View& x, int weight, int64_t group, float eps, int linear, int64_t begin, int64_t end) {
            self.norm_prepare(x, weight, group, eps, linear, {begin, end});
          },
          "x"_a, "weight"_a, "group"_a, "eps"_a, "linear"_a, "begin"_a, "end"_a)
      .def(
          "glu_prepare",
          [](Plan& self, const std::string& activation, const View& gate, const View& up, int linear, int64_t begin,
             int64_t end) { self.glu_prepare(glu_named(activation), gate, up, linear, {begin, end}); },
          "activation"_a, "gate"_a, "up"_a, "linear"_a, "begin"_a, "end"_a)
      .def(
          "linear",
          [](Plan& self, int64_t begin, int64_t end, int linear, int bias, const View* residual, const View& out) {
            self.linear({begin, end}, linear, bias, residual, out);
          },
          "begin"_a, "end"_a, "linear"_a, "bias"_a, "residual"_a.none(), "out"_a)
      .def("add", &Plan::add, "a"_a, "b"_a, "out"_a)
      .def(
          "glu",
          [](Plan& self, const std::string& activation, const View& gate, const View& up, const View& out) {
            self.glu(glu_named(activation), gate, up, out);
          },
          "activation"_a, "gate"_a, "up"_a, "out"_a)
      .def("rope", &Plan::rope, "x"_a, "head_dim"_a, "rotation"_a, "out"_a)
      .def(
          "attention",
          [](Plan& self, const View& q, int q_rotation, const View& k, int k_rotation, const View& v, const View& out,
             int layer, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t window, float scale) {
            self.attention(q, q_rotation, k, k_rotation, v, layer,
                           shape_of(self.runtime(), num_heads, num_kv_heads, head_dim, window, scale), out);
          },
          "q"_a, "q_rotation"_a, "k"_a, "k_rotation"_a, "v"_a, "out"_a, "layer"_a, "num_heads"_a, "num_kv_heads"_a,
          "head_dim"_a, "window"_a, "scale"_a)
      .def("select_rows", &Plan::select_rows, "x"_a, "out"_a)
      .def("sample", &Plan::sample, "logits"_a)
      .def(
          "sample_linear",
          [](Plan& self, int64_t begin, int64_t end, int linear, int bias, const View& logits) {
            self.sample_linear({begin, end}, linear, bias, logits);
          },
          "begin"_a, "end"_a, "linear"_a, "bias"_a, "logits"_a)
      .def("replay",
           [](Plan& self, const Array<int32_t, nb::ndim<1>>& token_ids, const Array<int32_t, nb::ndim<1>>& positions,
              const Array<int32_t, nb::ndim<1>>& seq_starts, const Array<int32_t, nb::ndim<1>>& context_lens,
              const Array<int32_t, nb::ndim<2>>& block_tables, const Array<int32_t, nb::ndim<1>>& sample_rows,
              const Array<double, nb::shape<-1, 6>>& numbers, const Array<int64_t, nb::shape<-1, 4>>& integers,
              const Array<int32_t, nb::ndim<1>>& ids, const Array<int64_t, nb::ndim<1>>& ends,
              const Array<double, nb::ndim<1>>& bias, const OutArray<int32_t, nb::ndim<1>>& tokens,
              const OutArray<float, nb::ndim<1>>& logprobs, const OutArray<int32_t, nb::ndim<2>>& top_ids,
              const OutArray<float, nb::ndim<2>>& top_logprobs, const OutArray<int32_t, nb::ndim<1>>& status,
              bool timed) {
             const Step step = step_of(token_ids, positions, seq_starts, context_lens, block_tables, sample_rows);
             const Runtime::Claim claim(self.runtime());
             fill_specs({numbers, integers, ids, ends, bias}, step.num_sampled, self.runtime().limits.vocab_size,
                        self.specs);
             fill_outputs({tokens, logprobs, top_ids, top_logprobs, status}, self.specs, self.outputs);
             const nb::gil_scoped_release release;
             self.replay(step, timed);
           })
      .def("read", &read_rows, "view"_a, "rows"_a)
      .def("profile", &profile_of)
      .def_prop_ro("num_ops", &Plan::num_ops)
      .def_prop_ro("num_barriers", &Plan::num_barriers);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("build", [] {
    nb::dict d;
#ifdef __OPTIMIZE__
    d["optimized"] = true;
#else
    d["optimized"] = false;
#endif
#ifdef HEADRACE_X86
    d["x86_kernels"] = true;
#else
    d["x86_kernels"] = false;
#endif
    return d;
  });
  m.def("available_isas", &available_isas);
  m.def("available_cores", &available_cores, "root"_a = "");
  m.def("cpu_quota", &cpu_quota, "root"_a = "");
  m.def(
      "read_bandwidth",
      [](size_t bytes, int threads, double seconds) { return read_bandwidth(bytes, threads, seconds); }, "bytes"_a,
      "threads"_a, "seconds"_a = 0.15, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "choose_activation",
      [](const std::string& name, const std::string& isa) {
        return activation_name(choose_activation(name, isa_named(isa)));
      },
      "name"_a, "isa"_a);
  m.def("arithmetics", [](const std::string& isa) { return arithmetics(choose_isa(isa)); }, "isa"_a);
  m.def(
      "matrix_rate",
      [](const std::string& arithmetic, const std::string& isa, int num_threads, double seconds) {
        return matrix_rate(arithmetic, choose_isa(isa), num_threads, seconds);
      },
      "arithmetic"_a, "isa"_a, "num_threads"_a, "seconds"_a = 0.1, nb::call_guard<nb::gil_scoped_release>());
  bind_files(m);
  bind_linear(m);
  bind_quantize(m);
  bind_runtime(m);
  bind_staged_weights(m);
  bind_plan(m);
}
