// What all plans of one model share: threads, packed weights, rotary tables, and the bytes of the KV cache.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "pages.h"
#include "thread_pool.h"

namespace headrace {

struct Limits {
  int32_t max_tokens;   // rows of a step
  int32_t max_sampled;  // sampled rows of a step, and sequences in it
  int32_t max_positions;
  int32_t vocab_size;
};

// A table of stored rows, decoded row by row. Borrows its bytes.
struct Table {
  Format format;
  const uint8_t* data;
  int64_t rows, features, row_bytes;
};

// cos and sin [positions][rotary_dim / 2].
struct Rotation {
  int32_t rotary_dim;
  std::vector<float> cos, sin;
};

struct KvCache {
  int32_t num_blocks, block_size;
  KvFormat format;
};

class Runtime {
 public:
  Runtime(int num_threads, Isa isa, Activation activation, const Limits& limits, const KvCache& cache);

  // Held for the length of a step: threads, arena and scratch serve one at a time.
  class Claim {
   public:
    explicit Claim(Runtime& runtime) : busy_(runtime.busy_) {
      if (busy_.exchange(true, std::memory_order_acquire)) throw std::invalid_argument("another step is running");
    }
    ~Claim() { busy_.store(false, std::memory_order_release); }
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;

   private:
    std::atomic<bool>& busy_;
  };

  // Each returns the number by which ops name the thing. `data` must stay valid: for linears until `pack` returns.
  int add_linear(Format format, const uint8_t* data, int64_t out_features, int64_t in_features, int64_t row_bytes);
  int add_table(const Table& table);
  int add_vector(const float* data, int64_t size);
  int add_rotation(const std::vector<double>& inv_freq, double scale);

  // The KV pool for layers of (number of KV heads, head dimension), in their order. Throws std::bad_alloc.
  void reserve_kv(const std::vector<std::pair<int32_t, int32_t>>& layers);

  // Pack every linear added since the last call, on all threads. Throws what a kernel threw.
  void pack();

  const Linear& linear(int i) const { return *linears_.at(i); }
  const Table& table(int i) const { return tables_.at(i); }
  const std::vector<float>& vector(int i) const { return vectors_.at(i); }
  const Rotation& rotation(int i) const { return rotations_.at(i); }
  const KvLayer& kv_layer(int i) const { return kv_layers_.at(i); }

  // The arena that plans lay their buffers out in; grows, and then moves, when a plan needs more.
  uint8_t* reserve_arena(size_t bytes);
  uint8_t* arena() const { return arena_.data(); }

  size_t packed_bytes() const;
  size_t kv_bytes() const { return kv_pages_.size(); }
  size_t arena_bytes() const { return arena_.size(); }

  ThreadPool pool;
  const Isa isa;
  const Activation activation;
  const Limits limits;
  const KvCache cache;
  const Kernels& kernels;

 private:
  struct Pending {
    int linear;
    WeightView weight;
  };

  std::vector<std::unique_ptr<Linear>> linears_;
  std::vector<Pending> pending_;
  std::vector<Pages> packed_;  // one for each call of `pack`
  std::vector<Table> tables_;
  std::vector<std::vector<float>> vectors_;
  std::vector<Rotation> rotations_;
  Pages kv_pages_;
  std::vector<KvLayer> kv_layers_;
  Pages arena_;
  std::atomic<bool> busy_{false};
};

}  // namespace headrace
