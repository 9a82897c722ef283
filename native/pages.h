// Memory from the system, by the page.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

// Zeroed memory that takes no room until it is touched, in huge pages where the system has them: what is streamed once
// per step (weights, keys and values) would otherwise miss the TLB on every 4 KiB.
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t bytes);  // throws std::bad_alloc
  ~Pages();
  Pages(Pages&& other) noexcept;
  Pages& operator=(Pages&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Take the whole pages among these bytes of a mapped file out of this process's memory. They stay in the system's
// cache, and come back when they are read. Not for memory without a file behind it, which would lose what it holds.
void release_mapped(const uint8_t* data, size_t bytes);

}  // namespace headrace
