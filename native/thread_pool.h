// A fixed team of threads that walks one job together, with barriers between its parts.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace headrace {

// Every thread of the team calls `wait`; none returns before all have called. Spins briefly, then gives up the core, so
// that a machine with more runnable threads than cores stays usable.
class Barrier {
 public:
  Barrier(int size, int spins) : size_(size), spins_(spins) {}
  void wait();

 private:
  const int size_, spins_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

// `num_threads - 1` threads that sleep between jobs; the caller of `run` is worker 0.
class ThreadPool {
 public:
  using Job = void (*)(void* context, int worker);

  // Throws std::invalid_argument if the system does not start that many.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Run `job(context, worker)` on every worker; returns when all have. Allocates nothing. Jobs must not throw. One
  // caller at a time. Throws std::invalid_argument, before anything ran, in a process forked since.
  void run(Job job, void* context);

  // Inside a job: wait for the other workers.
  void barrier() { barrier_.wait(); }

  // Call `body(index)` for every index below `count`, in any order, on all workers. `body` must not throw.
  void parallel_for(int64_t count, const std::function<void(int64_t)>& body);

 private:
  void work(int worker);
  void stop();

  const int size_;
  const pid_t process_;
  const bool crowded_;  // more threads than cores
  Barrier barrier_;
  Job job_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> started_{0};
  alignas(64) std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

}  // namespace headrace
