#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "cores.h"
#include "isa.h"
#include "pages.h"
#include "peak_loops.h"
#include "thread_pool.h"

namespace headrace {
namespace {

using Read = uint64_t (*)(const uint64_t* x, int64_t n);

struct Reads {
  Read plain, ahead;
};

Reads reads_for([[maybe_unused]] Isa isa) {
#ifdef HEADRACE_X86
  if (isa >= Isa::avx512) return {avx512::read_words, avx512::read_words_ahead};
  if (isa == Isa::avx2) return {avx2::read_words, avx2::read_words_ahead};
#endif
  return {portable::read_words, portable::read_words_ahead};
}

struct Work {
  std::vector<Pages> parts;  // one per worker, who touches it first, so that it lies near that worker
  int64_t words;             // of each
  int64_t rounds;            // of one pass
  Read read;
  std::atomic<uint64_t> sink{0};  // keeps the sums alive

  const uint64_t* part(int worker) const { return reinterpret_cast<const uint64_t*>(parts[worker].data()); }
};

void touch(void* context, int worker) {
  auto& work = *static_cast<Work*>(context);
  std::fill_n(work.parts[worker].data(), work.parts[worker].size(), uint8_t{1});
}

void read_part(void* context, int worker) {
  auto& work = *static_cast<Work*>(context);
  uint64_t sum = 0;
  for (int64_t i = 0; i < work.rounds; ++i) sum += work.read(work.part(worker), work.words);
  work.sink.fetch_add(sum, std::memory_order_relaxed);
}

}  // namespace

double read_bandwidth(size_t bytes, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kPassBytes = 1 << 20;  // of a thread: some 10 microseconds or more, against 1 to start a pass
  ThreadPool pool(threads);
  const FirstCpu beside_the_others;
  const int64_t share = static_cast<int64_t>(bytes / sizeof(uint64_t) / pool.size());
  Work work;
  work.words = std::max<int64_t>(share / kReadWords, 1) * kReadWords;
  const int64_t part_bytes = work.words * static_cast<int64_t>(sizeof(uint64_t));
  work.rounds = std::max<int64_t>(kPassBytes / part_bytes, 1);
  for (int i = 0; i < pool.size(); ++i) work.parts.emplace_back(part_bytes);
  pool.run(touch, &work);
  const Reads reads = reads_for(choose_isa(""));
  const auto start = Clock::now();
  double best = 1e30, spent = 0;
  for (int pass = 0; pass < 4 || spent < seconds;
       ++pass) {  // two of each kind at least, the first of which warm caches
    work.read = pass % 2 ? reads.ahead : reads.plain;
    const auto begin = Clock::now();
    pool.run(read_part, &work);
    const auto end = Clock::now();
    best = std::min(best, std::chrono::duration<double>(end - begin).count());
    spent = std::chrono::duration<double>(end - start).count();
  }
  return static_cast<double>(part_bytes * work.rounds * pool.size()) / best;
}

}  // namespace headrace
