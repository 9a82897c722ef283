// Uninitialized, cache-line aligned memory for packed weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace headrace {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) {
    // Large buffers ask for huge pages: weights are streamed once per step, and 4 KiB pages cost TLB misses.
    align_ = std::align_val_t{bytes >= kHugePage ? kHugePage : 64};
    data_ = static_cast<uint8_t*>(::operator new(bytes, align_));
#if defined(__linux__)
    if (bytes >= kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(align_, other.align_);
    return *this;
  }
  ~Buffer() { ::operator delete(data_, align_); }

  template <typename T = uint8_t>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;
  uint8_t* data_ = nullptr;
  std::align_val_t align_{64};
};

}  // namespace headrace
