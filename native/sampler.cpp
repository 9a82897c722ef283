#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace headrace {
namespace {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15u;
constexpr double kNothing = -std::numeric_limits<double>::infinity();

uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

}  // namespace

double uniform(int64_t seed, int64_t index) {
  const uint64_t state = mix64(static_cast<uint64_t>(seed) + kGamma);
  const uint64_t bits = mix64(state + (static_cast<uint64_t>(index) + 1) * kGamma);
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

Sampler::Sampler(const Kernels& kernels, int32_t vocab_size)
    : kernels_(kernels),
      vocab_size_(vocab_size),
      x_(vocab_size),
      weights_(vocab_size),
      places_(vocab_size),
      candidates_(vocab_size),
      counts_(vocab_size) {}

void Sampler::choose(const Peak& peak, const SampleOutput& out) {
  *out.status = peak.usable() ? SampleStatus::ok : SampleStatus::raw_not_finite;
  if (peak.usable()) *out.token = peak.index;
}

void Sampler::sample(const float* logits, const SampleSpec& spec, const SampleOutput& out) {
  const Peak peak = kernels_.peak(logits, vocab_size_);
  choose(peak, out);
  if (*out.status != SampleStatus::ok) return;
  int32_t token = peak.index;
  if (spec.is_processed()) {
    token = process(logits, spec);
    if (token < 0) {
      *out.status = SampleStatus::nothing_left;
      return;
    }
  }
  if (spec.temperature != 0.0) {
    if (spec.is_processed()) {
      const double highest = x_[token];
      const double total = kernels_.exp_weights_f64(x_.data(), vocab_size_, highest, spec.temperature, weights_.data());
      token = draw(x_.data(), highest, spec, total);
    } else {
      const double total = kernels_.exp_weights(logits, vocab_size_, peak.value, spec.temperature, weights_.data());
      token = draw(logits, peak.value, spec, total);
    }
  }
  *out.token = token;
  if (spec.logprobs >= 0) report(logits, peak, token, spec, out);
}

int32_t Sampler::process(const float* logits, const SampleSpec& spec) {
  for (int32_t i = 0; i < vocab_size_; ++i) x_[i] = logits[i];
  for (int64_t i = 0; i < spec.bias_ids.size; ++i) x_[spec.bias_ids.data[i]] += spec.bias[i];
  for (int64_t i = 0; i < spec.banned.size; ++i) x_[spec.banned.data[i]] = kNothing;
  if (spec.repetition != 1.0) {
    for (const Ids& ids : {spec.prompt, spec.output}) {
      for (int64_t i = 0; i < ids.size; ++i) {
        double& x = x_[ids.data[i]];
        if (counts_[ids.data[i]]++ == 0) x = x > 0 ? x / spec.repetition : x * spec.repetition;
      }
    }
    for (const Ids& ids : {spec.prompt, spec.output}) {
      for (int64_t i = 0; i < ids.size; ++i) counts_[ids.data[i]] = 0;
    }
  }
  if (spec.presence != 0.0 || spec.frequency != 0.0) {
    for (int64_t i = 0; i < spec.output.size; ++i) ++counts_[spec.output.data[i]];
    for (int64_t i = 0; i < spec.output.size; ++i) {
      int32_t& count = counts_[spec.output.data[i]];
      if (count == 0) continue;
      x_[spec.output.data[i]] -= spec.presence;
      x_[spec.output.data[i]] -= spec.frequency * count;
      count = 0;
    }
  }
  const auto best = std::max_element(x_.begin(), x_.end());
  if (!(*best > kNothing && *best <= std::numeric_limits<double>::max())) return -1;
  return static_cast<int32_t>(best - x_.begin());
}

template <typename T>
int32_t Sampler::draw(const T* x, double peak, const SampleSpec& spec, double total) {
  // Most draws end among the few likely tokens: look there first, and everywhere only if that does not settle it.
  constexpr double kLikely = 0x1p-12;
  const int32_t token = draw_from(x, peak, spec, kLikely, total);
  return token >= 0 ? token : draw_from(x, peak, spec, 0.0, total);
}

// Draw looking only at candidates of at least this weight; -1 if the choice may lie among the others.
template <typename T>
int32_t Sampler::draw_from(const T* x, double peak, const SampleSpec& spec, double lowest_weight, double total) {
  Kept kept{0, lowest_weight == 0.0, total};
  const int64_t found = kernels_.places_at_least(weights_.data(), vocab_size_, lowest_weight, places_.data());
  for (int64_t i = 0; i < found; ++i) {
    const int32_t id = places_[i];
    const double scaled = (x[id] - peak) / spec.temperature;
    if (scaled > kNothing) candidates_[kept.count++] = {scaled, weights_[id], id};
  }
  if (!truncate(spec, lowest_weight, kept)) return -1;
  const double target = uniform(spec.seed, spec.index) * kept.total;
  if (!kept.complete && sum_of_weights(kept.count) <= target) return -1;
  return candidates_[prefix_reaching(kept.count, target, true) - 1].id;
}

// Put the candidates that the truncations leave first, in no particular order; false if more must be gathered to tell.
bool Sampler::truncate(const SampleSpec& spec, double lowest_weight, Kept& kept) {
  if (spec.top_k > 0 && (spec.top_k < kept.count || !kept.complete)) {
    if (spec.top_k > kept.count) return false;
    std::nth_element(candidates_.begin(), candidates_.begin() + spec.top_k - 1, candidates_.begin() + kept.count,
                     preferred);
    kept = {spec.top_k, true, sum_of_weights(spec.top_k)};
  }
  if (spec.top_p < 1.0) {
    const double target = spec.top_p * kept.total;
    if (!kept.complete && sum_of_weights(kept.count) < target) return false;
    kept.count = prefix_reaching(kept.count, target, false);
    kept = {kept.count, true, sum_of_weights(kept.count)};
  }
  if (spec.min_p > 0.0) {
    if (!kept.complete && spec.min_p < lowest_weight) return false;
    const auto end = std::partition(candidates_.begin(), candidates_.begin() + kept.count,
                                    [&](const Candidate& c) { return c.weight >= spec.min_p; });
    kept.count = std::max<int64_t>(1, end - candidates_.begin());
    kept = {kept.count, true, sum_of_weights(kept.count)};
  }
  return true;
}

double Sampler::sum_of_weights(int64_t count) const {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += candidates_[i].weight;
  return total;
}

// The length of the shortest prefix, in order of preference, of the first `count` candidates whose weights sum to at
// least `target` (or to more, if `beyond`), `count` if none does. Puts that prefix first, its last candidate last.
// Quickselect by weight: the part that cannot hold the boundary is summed, not sorted.
int64_t Sampler::prefix_reaching(int64_t count, double target, bool beyond) {
  constexpr int64_t kSmall = 64;
  int64_t begin = 0, end = count;
  double sum = 0;  // of all candidates before `begin`
  while (end - begin > kSmall) {
    const auto first = candidates_.begin();
    const int64_t quarter = (end - begin) / 4;
    const Candidate a = first[begin + quarter], b = first[begin + 2 * quarter], c = first[begin + 3 * quarter];
    const Candidate pivot =
        std::max(std::min(a, b, preferred), std::min(std::max(a, b, preferred), c, preferred), preferred);
    const auto split =
        std::partition(first + begin, first + end, [&](const Candidate& x) { return preferred(x, pivot); });
    const int64_t middle = split - first;
    double upper = 0;
    for (int64_t i = begin; i < middle; ++i) upper += candidates_[i].weight;
    if (beyond ? sum + upper > target : sum + upper >= target) {
      end = middle;
    } else {
      sum += upper;
      begin = middle;
    }
  }
  std::sort(candidates_.begin() + begin, candidates_.begin() + end, preferred);
  for (int64_t i = begin; i < end; ++i) {
    sum += candidates_[i].weight;
    if (beyond ? sum > target : sum >= target) return i + 1;
  }
  return end;
}

void Sampler::report(const float* logits, const Peak& peak, int32_t token, const SampleSpec& spec,
                     const SampleOutput& out) {
  const double log_sum = peak.value + std::log(kernels_.sum_exp(logits, vocab_size_, peak.value));
  *out.logprob = static_cast<float>(logits[token] - log_sum);
  int32_t held = 0;
  const int32_t wanted = std::min(spec.logprobs, vocab_size_);
  for (int32_t id = 0; id < vocab_size_ && wanted > 0; ++id) {
    if (held == wanted && logits[id] <= logits[out.top_ids[held - 1]]) continue;
    int32_t place = held < wanted ? held++ : held - 1;
    for (; place > 0 && logits[id] > logits[out.top_ids[place - 1]]; --place)
      out.top_ids[place] = out.top_ids[place - 1];
    out.top_ids[place] = id;
  }
  for (int32_t i = 0; i < held; ++i) out.top_logprobs[i] = static_cast<float>(logits[out.top_ids[i]] - log_sum);
}

}  // namespace headrace
