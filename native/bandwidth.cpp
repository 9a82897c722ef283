#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace headrace {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
#define HEADRACE_WIDEST __attribute__((target_clones("avx2", "default")))
#else
#define HEADRACE_WIDEST
#endif

// 64 independent sums, so that loads and not additions are the limit; the compiler makes vectors of them.
HEADRACE_WIDEST uint64_t sum(const uint64_t* data, size_t count) {
  uint64_t lanes[64] = {};
  size_t i = 0;
  for (; i + 64 <= count; i += 64)
    for (size_t lane = 0; lane < 64; ++lane) lanes[lane] += data[i + lane];
  uint64_t total = 0;
  for (uint64_t lane : lanes) total += lane;
  return total;
}

}  // namespace

double read_bandwidth(size_t bytes, int threads, double seconds) {
  using clock = std::chrono::steady_clock;
  const size_t words = std::max<size_t>(bytes / sizeof(uint64_t) / threads, 1024);
  std::atomic<uint64_t> sink{0};  // keeps the sums alive
  std::atomic<bool> stop{false};
  clock::time_point start{}, deadline{};
  double fastest = 1e30;
  // Between passes one thread takes the time: a pass lasts from the first thread's start to the last one's end.
  auto on_pass = [&]() noexcept {
    const auto now = clock::now();
    if (start != clock::time_point{}) fastest = std::min(fastest, std::chrono::duration<double>(now - start).count());
    if (deadline == clock::time_point{}) deadline = now + std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(seconds));
    stop = now > deadline && fastest < 1e30;
    start = clock::now();
  };
  std::barrier barrier(threads, on_pass);
  auto work = [&] {
    std::vector<uint64_t> data(words, 1);  // touched by the thread that reads it
    for (;;) {
      barrier.arrive_and_wait();
      if (stop) return;
      sink += sum(data.data(), words);
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (auto& thread : others) thread.join();
  return static_cast<double>(words) * sizeof(uint64_t) * threads / fastest;
}

}  // namespace headrace
