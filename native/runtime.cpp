#include "runtime.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "cores.h"

namespace headrace {
namespace {

size_t aligned(size_t bytes) { return (bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment; }

}  // namespace

Runtime::Runtime(int num_threads, Isa isa_, Activation activation_, const Limits& limits_, const KvCache& cache_)
    : pool(num_threads > 0 ? num_threads : available_cores()),
      isa(isa_),
      activation(activation_),
      limits(limits_),
      cache(cache_),
      kernels(kernels_for(isa_)) {
  const auto require = [](const char* name, int32_t value) {
    if (value < 1) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value));
  };
  require("max_batched_tokens", limits.max_tokens);
  require("max_num_seqs", limits.max_sampled);
  require("max_model_len", limits.max_positions);
  require("vocab_size", limits.vocab_size);
  require("num_blocks", cache.num_blocks);
  require("block_size", cache.block_size);
}

int Runtime::add_linear(Format format, const uint8_t* data, int64_t out_features, int64_t in_features,
                        int64_t row_bytes) {
  linears_.push_back(make_linear(format, out_features, in_features, isa, activation));
  const int index = static_cast<int>(linears_.size()) - 1;
  pending_.push_back({index, {format, data, out_features, in_features, row_bytes}});
  return index;
}

int Runtime::add_table(const Table& table) {
  tables_.push_back(table);
  return static_cast<int>(tables_.size()) - 1;
}

int Runtime::add_vector(const float* data, int64_t size) {
  vectors_.emplace_back(data, data + size);
  return static_cast<int>(vectors_.size()) - 1;
}

int Runtime::add_rotation(const std::vector<double>& inv_freq, double scale) {
  const size_t half = inv_freq.size(), values = half * limits.max_positions;
  Rotation rotation{static_cast<int32_t>(2 * half), std::vector<float>(values), std::vector<float>(values)};
  pool.parallel_for((limits.max_positions + 63) / 64, [&](int64_t chunk) {
    const int64_t end = std::min<int64_t>((chunk + 1) * 64, limits.max_positions);
    for (int64_t position = chunk * 64; position < end; ++position) {
      for (size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) * inv_freq[i];
        rotation.cos[position * half + i] = static_cast<float>(std::cos(angle) * scale);
        rotation.sin[position * half + i] = static_cast<float>(std::sin(angle) * scale);
      }
    }
  });
  rotations_.push_back(std::move(rotation));
  return static_cast<int>(rotations_.size()) - 1;
}

void Runtime::reserve_kv(const std::vector<std::pair<int32_t, int32_t>>& layers) {
  // See headrace.executors.kv_layout.
  const int64_t value_bytes = cache.format == KvFormat::f32 ? 4 : cache.format == KvFormat::bf16 ? 2 : 1;
  const int64_t scale_bytes = cache.format == KvFormat::int8 ? sizeof(float) : 0;
  struct Part {
    int64_t values, scales;  // bytes of a layer's keys in a block, and of their scales; its values take as many
    int64_t bytes() const { return (2 * (values + scales) + 3) / 4 * 4; }  // so that all scales are aligned
  };
  std::vector<Part> parts;
  int64_t block_bytes = 0;
  for (const auto& [num_kv_heads, head_dim] : layers) {
    const int64_t heads = int64_t{cache.block_size} * num_kv_heads;
    block_bytes += parts.emplace_back(heads * head_dim * value_bytes, heads * scale_bytes).bytes();
  }
  kv_pages_ = Pages(cache.num_blocks * block_bytes);
  uint8_t* at = kv_pages_.data();
  for (const Part& part : parts) {
    uint8_t* keys = at + 2 * part.scales;
    kv_layers_.push_back({keys, keys + part.values, at, at + part.scales, block_bytes});
    at += part.bytes();
  }
}

void Runtime::pack() {
  struct Piece {
    Pending pending;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  const std::vector<Pending> added = std::exchange(pending_, {});
  size_t bytes = 0;
  for (const Pending& pending : added) bytes += aligned(linear(pending.linear).packed_bytes);
  uint8_t* memory = packed_.emplace_back(bytes).data();
  for (const Pending& pending : added) {
    linears_[pending.linear]->place(memory);
    memory += aligned(linear(pending.linear).packed_bytes);
    const int64_t columns = linear(pending.linear).out_features, tile = linear(pending.linear).column_tile;
    const int64_t step = std::max<int64_t>(1, 256 / tile) * tile;
    for (int64_t begin = 0; begin < columns; begin += step) {
      pieces.push_back({pending, begin, std::min(begin + step, columns)});
    }
  }
  std::exception_ptr error;
  std::mutex mutex;
  pool.parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    try {
      linears_[pieces[i].pending.linear]->pack(pieces[i].pending.weight, pieces[i].begin, pieces[i].end);
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

uint8_t* Runtime::reserve_arena(size_t bytes) {
  if (bytes > arena_.size()) arena_ = Pages(bytes);  // if it throws, older plans still have theirs
  return arena_.data();
}

size_t Runtime::packed_bytes() const {
  size_t total = 0;
  for (const auto& linear : linears_) total += linear->packed_bytes;
  return total;
}

}  // namespace headrace
