#include "runtime.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "checksum.h"
#include "cores.h"

namespace headrace {
namespace {

bool read_fully(int fd, uint8_t* to, size_t bytes, int64_t offset) {
  while (bytes > 0) {
    const ssize_t got = pread(fd, to, bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got, offset += got, bytes -= got;
  }
  return true;
}

}  // namespace

size_t packed_room(const Linear& linear) {
  return (linear.packed_bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
}

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

int Runtime::add_linear(const WeightView& weight, bool mapped, int64_t interleaved_heads) {
  linears_.push_back(make_linear(weight.format, weight.out_features, weight.in_features, isa, activation));
  formats_.push_back(weight.format);
  places_.push_back(nullptr);
  const int index = static_cast<int>(linears_.size()) - 1;
  pending_.push_back({index, weight, mapped, interleaved_heads});
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
  struct Part {
    int64_t values, scales;  // bytes of a layer's keys in a block, and of their scales; its values take as many
    int64_t bytes() const { return (2 * (values + scales) + 3) / 4 * 4; }  // so that all scales are aligned
  };
  std::vector<Part> parts;
  int64_t block_bytes = 0;
  const bool integers = cache.format == KvFormat::int8 || cache.format == KvFormat::int4;
  for (const auto& [num_kv_heads, head_dim] : layers) {
    if (integers && head_dim > kMaxIntegerHeadDim) {
      throw std::invalid_argument("integer keys and values of heads beyond " + std::to_string(kMaxIntegerHeadDim));
    }
    const int64_t scales = cache.block_size * kv_scales(cache.format, head_dim) * int64_t{sizeof(float)};
    const int64_t values = kv_head_bytes(cache.format, head_dim, cache.block_size);
    block_bytes += parts.emplace_back(num_kv_heads * values, num_kv_heads * scales).bytes();
  }
  kv_pages_ = Pages(cache.num_blocks * block_bytes);
  uint8_t* at = kv_pages_.data();
  for (const Part& part : parts) {
    uint8_t* keys = at + 2 * part.scales;
    kv_layers_.push_back({keys, keys + part.values, at, at + part.scales, block_bytes});
    at += part.bytes();
  }
}

size_t Runtime::pending_bytes() const {
  size_t bytes = 0;
  for (const Pending& pending : pending_) bytes += packed_room(linear(pending.linear));
  return bytes;
}

// Give the pending linears their places, one after the other, and take them off the list.
std::vector<Runtime::Pending> Runtime::place(uint8_t* memory) {
  for (const Pending& pending : pending_) {
    linears_[pending.linear]->place(memory);
    places_[pending.linear] = memory;
    memory += packed_room(linear(pending.linear));
  }
  return std::exchange(pending_, {});
}

// Read rather than mapped: a file's pages are small, and decoding streams all of them at every step.
bool Runtime::read_packed(int fd, int64_t offset, size_t piece, uint64_t expected) {
  auto pages = std::make_shared<Pages>(pending_bytes());
  const Pages& memory = *pages;
  std::vector<uint64_t> sums((memory.size() + piece - 1) / piece);
  pool.parallel_for(static_cast<int64_t>(sums.size()), [&](int64_t i) {
    const size_t begin = i * piece, bytes = std::min(piece, memory.size() - begin);
    if (read_fully(fd, memory.data() + begin, bytes, offset + static_cast<int64_t>(begin))) {
      sums[i] = checksum(memory.data() + begin, bytes);  // while it is in the core's cache
    }
  });
  if (checksum(reinterpret_cast<const uint8_t*>(sums.data()), 8 * sums.size()) != expected) return false;
  for (const Pending& pending : place(memory.data())) {
    if (pending.mapped) release_mapped(pending.weight.data, pending.weight.out_features * pending.weight.row_bytes);
  }
  packed_.push_back(std::move(pages));
  return true;
}

void pack_columns(Linear& linear, const WeightView& weight, int64_t interleaved_heads, int64_t begin, int64_t end) {
  WeightView view = weight;
  std::vector<uint8_t> ordered;
  if (interleaved_heads > 0) {
    const int64_t head = view.out_features / interleaved_heads, half = head / 2;
    ordered.resize((end - begin) * view.row_bytes);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t stored = row / head * head + row % half * 2 + row % head / half;
      std::memcpy(ordered.data() + (row - begin) * view.row_bytes, view.data + stored * view.row_bytes, view.row_bytes);
    }
    view.data = ordered.data() - begin * view.row_bytes;  // kernels read the rows of their columns alone
  }
  linear.pack(view, begin, end);
}

std::shared_ptr<const Pages> Runtime::pack() {
  struct Piece {
    size_t pending;
    int64_t begin, end;
  };
  packed_.push_back(std::make_shared<Pages>(pending_bytes()));
  const std::vector<Pending> added = place(packed_.back()->data());
  std::vector<Piece> pieces;
  std::vector<std::atomic<int64_t>> left(added.size());  // pieces of each
  for (size_t i = 0; i < added.size(); ++i) {
    const int64_t columns = linear(added[i].linear).out_features, tile = linear(added[i].linear).column_tile;
    const int64_t step = std::max<int64_t>(1, 256 / tile) * tile;
    for (int64_t begin = 0; begin < columns; begin += step) {
      pieces.push_back({i, begin, std::min(begin + step, columns)});
      ++left[i];
    }
  }
  std::exception_ptr error;
  std::mutex mutex;
  pool.parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const auto& [index, begin, end] = pieces[i];
    const Pending& pending = added[index];
    try {
      pack_columns(*linears_[pending.linear], pending.weight, pending.interleaved_heads, begin, end);
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
    if (--left[index] == 0 && pending.mapped) {
      release_mapped(pending.weight.data, pending.weight.out_features * pending.weight.row_bytes);
    }
  });
  if (error) std::rethrow_exception(error);
  return packed_.back();
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
