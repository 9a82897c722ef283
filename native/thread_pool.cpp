#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <system_error>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

#include "cores.h"

namespace headrace {
namespace {

// Tens of microseconds of pauses: longer than any wait between two well-split ops, shorter than a time slice.
constexpr int kSpins = 1000;
// Between steps the scheduler and the sampler's caller run for some 100 microseconds: worth waiting for awake.
constexpr int kIdleSpins = 10000;
constexpr int kYields = 50;
constexpr int kMostThreads = 1024;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Until `value` differs from `old`: spin, then yield, then sleep. With no spins, sleep at once: what is waited for
// needs the core.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  for (int i = 0; i < kYields && spins > 0; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    std::this_thread::yield();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

void Barrier::wait() {
  if (size_ == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    generation_.notify_all();
  } else {
    wait_for_change(generation_, generation, spins_);
  }
}

ThreadPool::ThreadPool(int num_threads)
    : size_(std::max(1, num_threads)),
      process_(getpid()),
      crowded_(size_ > available_cores()),
      barrier_(size_, crowded_ ? 0 : kSpins) {
  if (size_ > kMostThreads) {
    throw std::invalid_argument(std::to_string(size_) + " threads, of at most " + std::to_string(kMostThreads));
  }
  threads_.reserve(size_ - 1);
  try {
    for (int worker = 1; worker < size_; ++worker) threads_.emplace_back([this, worker] { work(worker); });
  } catch (const std::system_error& error) {
    stop();
    throw std::invalid_argument("the system starts no " + std::to_string(size_) + " threads: " + error.what());
  }
#ifdef __linux__
  // One thread per allowed core: keep each on its own. It matters where two processes share the cores: left to roam,
  // both together did a tenth less. The caller's thread is not ours to move.
  const auto cpus = allowed_cpus();
  if (static_cast<int>(cpus.size()) == size_ && available_cores() == size_) {
    for (int worker = 1; worker < size_; ++worker) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpus[worker], &set);
      pthread_setaffinity_np(threads_[worker - 1].native_handle(), sizeof set, &set);
    }
  }
#endif
}

ThreadPool::~ThreadPool() {
  // A forked child has the team's memory without its threads: there is nothing to stop, and joining would never end.
  if (getpid() == process_) {
    stop();
  } else {
    for (auto& thread : threads_) thread.detach();
  }
}

void ThreadPool::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::run(Job job, void* context) {
  if (size_ > 1 && getpid() != process_) {
    throw std::invalid_argument("this process was forked, and the executor's threads stayed with its parent");
  }
  job_ = job;
  context_ = context;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  job(context, 0);
  barrier_.wait();
}

void ThreadPool::work(int worker) {
  for (uint32_t seen = 0;; ++seen) {
    wait_for_change(started_, seen, crowded_ ? 0 : kIdleSpins);
    if (stopping_.load(std::memory_order_relaxed)) return;
    job_(context_, worker);
    barrier_.wait();
  }
}

void ThreadPool::parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  struct Shared {
    const std::function<void(int64_t)>& body;
    const int64_t count;
    std::atomic<int64_t> next{0};
  } shared{body, count};
  run(
      [](void* context, int) {
        auto& all = *static_cast<Shared*>(context);
        for (int64_t i; (i = all.next.fetch_add(1, std::memory_order_relaxed)) < all.count;) all.body(i);
      },
      &shared);
}

}  // namespace headrace
