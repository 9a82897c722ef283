// From a row of logits to a token: the same rules as the Python reference (headrace.executors.sampler), where they
// stand.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace headrace {

struct Ids {
  const int32_t* data;
  int64_t size;
};

// What one row asks for.
struct SampleSpec {
  double temperature, top_p, min_p, repetition, presence, frequency;
  int64_t seed, index;
  int32_t top_k;
  int32_t logprobs;  // alternatives to report; -1: no logprobs at all
  Ids bias_ids, banned, prompt, output;
  const double* bias;

  // Whether the place of the highest logit is all that is asked for.
  bool is_greedy() const { return temperature == 0.0 && logprobs < 0 && !is_processed(); }
  bool is_processed() const {
    return bias_ids.size > 0 || banned.size > 0 || repetition != 1.0 || presence != 0.0 || frequency != 0.0;
  }
};

enum class SampleStatus : int32_t { ok, raw_not_finite, nothing_left };

// Where one row's results go; top_ids and top_logprobs hold `num_top` entries and are filled up to the row's
// `logprobs`.
struct SampleOutput {
  int32_t* token;
  float* logprob;
  int32_t* top_ids;
  float* top_logprobs;
  SampleStatus* status;
};

// Uniform in [0, 1) from (seed, index): SplitMix64.
double uniform(int64_t seed, int64_t index);

// Working memory of one thread; sized once for a vocabulary.
class Sampler {
 public:
  Sampler(const Kernels& kernels, int32_t vocab_size);

  // Ids in the spec must be below the vocabulary's size.
  void sample(const float* logits, const SampleSpec& spec, const SampleOutput& out);

  // The same of a row whose spec is greedy and whose highest logit is known.
  static void choose(const Peak& peak, const SampleOutput& out);

 private:
  struct Candidate {
    double x, weight;
    int32_t id;
  };
  static bool preferred(const Candidate& a, const Candidate& b) { return a.x != b.x ? a.x > b.x : a.id < b.id; }

  // A prefix, in order of preference, of the candidates gathered so far.
  struct Kept {
    int64_t count;
    bool complete;  // no candidate that was not gathered belongs to it
    double total;   // weight, of all that belong to it
  };

  // Into x_; returns the place of the highest, or -1 if nothing is left to choose from.
  int32_t process(const float* logits, const SampleSpec& spec);
  template <typename T>
  int32_t draw(const T* x, double peak, const SampleSpec& spec, double total);
  template <typename T>
  int32_t draw_from(const T* x, double peak, const SampleSpec& spec, double lowest_weight, double total);
  bool truncate(const SampleSpec& spec, double lowest_weight, Kept& kept);
  int64_t prefix_reaching(int64_t count, double target, bool beyond);
  double sum_of_weights(int64_t count) const;
  void report(const float* logits, const Peak& peak, int32_t token, const SampleSpec& spec, const SampleOutput& out);

  const Kernels& kernels_;
  const int32_t vocab_size_;
  std::vector<double> x_, weights_;
  std::vector<int32_t> places_;
  std::vector<Candidate> candidates_;
  std::vector<int32_t> counts_;  // all zero between rows
};

}  // namespace headrace
