// Strided matrices in global memory, and how a block brings a tile of one into shared memory.
#pragma once

#include "common/types.cuh"

namespace gradshield {

// x[row, k], any strides in elements. The products of this library sum over k.
struct Operand {
  const void* data;
  int64_t rows, stride_row, stride_k;
  int32_t dtype;
};

__host__ __device__ inline Operand operand(const void* data, int32_t dtype, int64_t rows, int64_t stride_row,
                                           int64_t stride_k) {
  return Operand{data, rows, stride_row, stride_k, dtype};
}

__host__ __device__ inline int64_t item_bytes(int32_t dtype) {
  return dtype == kFloat32 || dtype == kInt32 ? 4 : dtype == kInt64 ? 8 : 2;
}

// Whether every row starts at a multiple of 16 bytes and lies in one piece, so that 16-byte copies can fetch it.
__host__ inline bool takes_vectors(const Operand& x) {
  return x.stride_k == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         x.stride_row * item_bytes(x.dtype) % 16 == 0;
}

// One element as float32 where a kernel reads too few of them to be worth an instantiation for each dtype.
__device__ __forceinline__ float load_as_float(const void* data, int32_t dtype, int64_t at) {
  if (dtype == kFloat32) return load_global(static_cast<const float*>(data) + at);
  if (dtype == kBfloat16) return to_float(load_global(static_cast<const Bf16*>(data) + at));
  return to_float(load_global(static_cast<const Half*>(data) + at));
}

// Brings x[row0 : row0 + kRows, k0 : k0 + kK] to tile [kRows][kPitch]; what lies beyond x.rows or k_end becomes zero.
// kVector: 16-byte asynchronous copies, visible after a wait and a barrier. Otherwise element by element, with the
// block's neighbouring threads along the axis that is nearer together in memory; visible after a barrier.
template <class T, int kRows, int kK, int kPitch, int kThreads, bool kVector>
__device__ __forceinline__ void stage(T* tile, const Operand& x, int64_t row0, int64_t k0, int64_t k_end) {
  const T* data = static_cast<const T*>(x.data);
  if constexpr (kVector) {
    constexpr int kPerCopy = 16 / sizeof(T), kPerRow = kK / kPerCopy;
    static_assert(kK % kPerCopy == 0 && kPitch * sizeof(T) % 16 == 0, "rows of a tile are whole 16-byte copies");
    static_assert(kRows * kPerRow % kThreads == 0, "every thread makes equally many copies");
#pragma unroll
    for (int step = 0; step < kRows * kPerRow / kThreads; ++step) {
      const int i = step * kThreads + static_cast<int>(threadIdx.x);
      const int row = i / kPerRow, k = i % kPerRow * kPerCopy;
      const int64_t left = row0 + row < x.rows ? k_end - (k0 + k) : 0;
      const int count = left <= 0 ? 0 : left < kPerCopy ? static_cast<int>(left) : kPerCopy;
      // a copy of nothing still wants an address: the first element's is always good
      const T* from = count ? data + (row0 + row) * x.stride_row + (k0 + k) : data;
      copy_async_16(tile + row * kPitch + k, from, count * static_cast<int>(sizeof(T)));
    }
  } else {
    const bool along_k = x.stride_k <= x.stride_row;
    static_assert(kRows * kK % kThreads == 0, "every thread brings equally many elements");
#pragma unroll 4
    for (int step = 0; step < kRows * kK / kThreads; ++step) {
      const int i = step * kThreads + static_cast<int>(threadIdx.x);
      const int row = along_k ? i / kK : i % kRows, k = along_k ? i % kK : i / kRows;
      T value{};
      if (row0 + row < x.rows && k0 + k < k_end)
        value = load_global(data + (row0 + row) * x.stride_row + (k0 + k) * x.stride_k);
      store_shared(tile + row * kPitch + k, value);
    }
  }
}

}  // namespace gradshield
