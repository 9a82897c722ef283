#include "peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <utility>

#ifdef HEADRACE_X86
#include <cpuid.h>
#endif

#include "cores.h"
#include "isa.h"
#include "peak_loops.h"
#include "thread_pool.h"

namespace headrace {
namespace {

using Named = std::pair<const char*, PeakLoop>;

#ifdef HEADRACE_X86
std::vector<Named> loops(Isa isa) {
  if (isa == Isa::portable) return {{"f32", portable::peak_f32()}};
  if (isa == Isa::avx2) {
    return {{"f32", avx2::peak_f32()}, {"int16", peak_int16_avx2()}, {"int8", peak_int8_avx2()}};
  }
  std::vector<Named> found = {{"f32", avx512::peak_f32()}};
  if (isa == Isa::amx) {
    found.emplace_back("bf16", peak_bf16_amx());
    found.emplace_back("int8", peak_int8_amx());
    return found;
  }
  if (__builtin_cpu_supports("avx512bf16")) found.emplace_back("bf16", peak_bf16_avx512_bf16());
  if (isa == Isa::avx512_vnni) found.emplace_back("int8", peak_int8_avx512_vnni());
  return found;
}
#else
std::vector<Named> loops(Isa) { return {{"f32", portable::peak_f32()}}; }
#endif

PeakLoop loop_named(const std::string& arithmetic, Isa isa) {
  std::string names;
  for (const auto& [name, loop] : loops(isa)) {
    if (arithmetic == name) return loop;
    names += std::string(" ") + name;
  }
  throw std::invalid_argument("instruction set '" + std::string(isa_name(isa)) + "' has no arithmetic '" + arithmetic +
                              "' on this machine, only:" + names);
}

// Seconds until all workers have run that many rounds.
double pass(ThreadPool& pool, const PeakLoop& loop, int64_t rounds) {
  using Clock = std::chrono::steady_clock;
  struct Work {
    const PeakLoop& loop;
    int64_t rounds;
    std::atomic<double> sink{0};  // keeps the sums alive
  } work{loop, rounds};
  const auto start = Clock::now();
  pool.run(
      [](void* context, int) {
        auto& shared = *static_cast<Work*>(context);
        shared.sink.store(shared.loop.run(shared.rounds), std::memory_order_relaxed);
      },
      &work);
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

double matrix_rate(const std::string& arithmetic, Isa isa, int num_threads, double seconds) {
  constexpr double kPassSeconds = 2e-3;
  const PeakLoop loop = loop_named(arithmetic, isa);
  ThreadPool pool(num_threads);
  const FirstCpu beside_the_others;
  int64_t rounds = 1000;
  double took = pass(pool, loop, rounds), spent = took;
  while (took < kPassSeconds) {
    rounds *= 2;
    spent += took = pass(pool, loop, rounds);
  }
  double best = took;
  while (spent < seconds) {
    spent += took = pass(pool, loop, rounds);
    best = std::min(best, took);
  }
  return loop.operations * static_cast<double>(rounds) * num_threads / best;
}

std::vector<std::string> arithmetics(Isa isa) {
  std::vector<std::string> names;
  for (const auto& each : loops(isa)) names.emplace_back(each.first);
  return names;
}

}  // namespace headrace
