// Working memory that a thread keeps from one call to the next: fresh pages would cost more than a small product.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/kernels.h"

namespace gsf {

class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // At least `count` elements on a cache line's boundary; what was there before is gone.
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

  // Gives a very large buffer back, so that one large call does not hold its memory for good. What an example of a
  // language model's head needs is kept: taking its pages anew for every example was measured to cost half the time.
  void trim() {
    if (size_ <= kKept) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr size_t kKept = 96 << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

// What kernels on this thread use as `scratch`.
inline float* kernel_scratch() {
  static thread_local Buffer buffer;
  return buffer.get<float>(kScratchFloats);
}

// Results between two kernels on this thread, by number: a driver uses each number once at a time.
inline float* block_scratch(int number, int64_t floats) {
  static thread_local Buffer buffers[3];
  return buffers[number].get<float>(floats);
}

}  // namespace gsf
