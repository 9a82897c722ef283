#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "isa.h"
#include "kernels.h"

namespace headrace {

double read_bandwidth(size_t bytes, int threads, double seconds) {
  using clock = std::chrono::steady_clock;
  const Kernels& kernels = kernels_for(choose_isa(""));
  const size_t words = std::max<size_t>(bytes / sizeof(uint64_t) / threads, 1024);
  std::atomic<uint64_t> sink{0};  // keeps the sums alive
  std::atomic<bool> stop{false};
  clock::time_point start{}, deadline{};
  double fastest = 1e30;
  // Between passes one thread takes the time: a pass lasts from the first thread's start to the last one's end.
  auto on_pass = [&]() noexcept {
    const auto now = clock::now();
    if (start != clock::time_point{}) fastest = std::min(fastest, std::chrono::duration<double>(now - start).count());
    if (deadline == clock::time_point{})
      deadline = now + std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(seconds));
    stop = now > deadline && fastest < 1e30;
    start = clock::now();
  };
  std::barrier barrier(threads, on_pass);
  auto work = [&] {
    std::vector<uint64_t> data(words, 1);  // touched by the thread that reads it
    for (;;) {
      barrier.arrive_and_wait();
      if (stop) return;
      sink += kernels.sum_words(data.data(), static_cast<int64_t>(words));
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (auto& thread : others) thread.join();
  return static_cast<double>(words) * sizeof(uint64_t) * threads / fastest;
}

}  // namespace headrace
