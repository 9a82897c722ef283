// What all plans of one model share: threads, packed weights, rotary tables, and the bytes of the KV cache.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
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

// Bytes that a linear's packed form takes among others.
size_t packed_room(const Linear& linear);

// Pack columns [begin, end) of a weight whose rows may be stored as the rotary pairs of so many heads: see
// `Runtime::add_linear`.
void pack_columns(Linear& linear, const WeightView& weight, int64_t interleaved_heads, int64_t begin, int64_t end);

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

  // Each returns the number by which ops name the thing. A linear's bytes must stay valid until `pack` returns. Where
  // they lie in a mapped file, `mapped`, their pages leave this process's memory once they are packed. With
  // `interleaved_heads`, each of so many heads has its rows as rotary pairs: 2i, 2i + 1 are rows i, i + half a head of
  // the matrix.
  int add_linear(const WeightView& weight, bool mapped, int64_t interleaved_heads);
  int add_table(const Table& table);
  int add_vector(const float* data, int64_t size);
  int add_rotation(const std::vector<double>& inv_freq, double scale);

  // The KV pool for layers of (number of KV heads, head dimension), in their order. Throws std::bad_alloc, and
  // std::invalid_argument for a head that is too large for integers.
  void reserve_kv(const std::vector<std::pair<int32_t, int32_t>>& layers);

  // Pack every linear added since the last call, on all threads; returns where, `pending_bytes` long. Who keeps it may
  // read it whatever becomes of the runtime and its weights. Throws what a kernel threw.
  std::shared_ptr<const Pages> pack();

  // Instead of packing, read what an earlier `pack` of equal linears made: `pending_bytes` bytes of a file from
  // `offset` on, on all threads. False, and nothing changed, if they cannot be read or their checksums (those of each
  // `piece` bytes, and one of these) do not come to `expected`.
  bool read_packed(int fd, int64_t offset, size_t piece, uint64_t expected);

  // Bytes that `pack` would fill now.
  size_t pending_bytes() const;

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
  friend class StagedWeights;

  struct Pending {
    int linear;
    WeightView weight;
    bool mapped;
    int64_t interleaved_heads;
  };

  std::vector<Pending> place(uint8_t* memory);

  std::vector<std::unique_ptr<Linear>> linears_;
  std::vector<Format> formats_;   // of each linear, as it was stored
  std::vector<uint8_t*> places_;  // of each linear, in `packed_`
  std::vector<Pending> pending_;
  std::vector<std::shared_ptr<const Pages>> packed_;  // one for each call of `pack`
  std::deque<Table> tables_;                          // a deque: plans refer to its elements
  std::vector<std::vector<float>> vectors_;
  std::deque<Rotation> rotations_;
  Pages kv_pages_;
  std::vector<KvLayer> kv_layers_;
  Pages arena_;
  std::atomic<bool> busy_{false};
};

}  // namespace headrace
