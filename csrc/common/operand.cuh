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

// Part i of `count` of a summed axis, in whole steps of 32; the last ones may be empty.
struct Slice {
  int64_t begin, end;
};

__host__ __device__ inline Slice slice_of(int64_t width, int64_t count, int64_t i) {
  const int64_t length = ceil_div(ceil_div(width, 32), count) * 32, begin = i * length;
  return {begin, begin + length < width ? begin + length : width};
}

// One element as float32 where a kernel reads too few of them to be worth an instantiation for each dtype.
__device__ __forceinline__ float load_as_float(const void* data, int32_t dtype, int64_t at) {
  if (dtype == kFloat32) return load_global(static_cast<const float*>(data) + at);
  if (dtype == kBfloat16) return to_float(load_global(static_cast<const Bf16*>(data) + at));
  return to_float(load_global(static_cast<const Half*>(data) + at));
}

// How a block's threads walk over a kRows x kK tile: thread by thread along the axis that is nearer together in memory,
// then in equal strides along the other, so that one address and one step per operand are all that a thread keeps.
template <int kRows, int kK, int kThreads>
struct Walk {
  static_assert(kThreads % kRows == 0 && kThreads % kK == 0, "a step is whole rows, or whole columns, of the tile");
  static constexpr int kSteps = kRows * kK / kThreads;
  int row, k, step_row, step_k;

  __device__ __forceinline__ explicit Walk(const Operand& x) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool along_k = x.stride_k <= x.stride_row;
    row = along_k ? thread / kK : thread % kRows;
    k = along_k ? thread % kK : thread / kRows;
    step_row = along_k ? kThreads / kK : 0;
    step_k = along_k ? 0 : kThreads / kRows;
  }
};

__device__ __forceinline__ int clamp_to(int64_t x, int limit) {
  return x < 0 ? 0 : x > limit ? limit : static_cast<int>(x);
}

// Brings x[row0 : row0 + kRows, k0 : k0 + kK] to tile [kRows][kPitch]; what lies beyond x.rows or k_end becomes zero.
// kVector: 16-byte asynchronous copies, visible after a wait and a barrier. Otherwise element by element, visible after
// a barrier.
template <class T, int kRows, int kK, int kPitch, int kThreads, bool kVector>
__device__ __forceinline__ void stage(T* tile, const Operand& x, int64_t row0, int64_t k0, int64_t k_end) {
  const T* data = static_cast<const T*>(x.data);
  const int rows = clamp_to(x.rows - row0, kRows), depth = clamp_to(k_end - k0, kK);
  if constexpr (kVector) {
    constexpr int kPerCopy = 16 / sizeof(T), kPerRow = kK / kPerCopy, kStepRows = kThreads / kPerRow;
    static_assert(kK % kPerCopy == 0 && kPitch * sizeof(T) % 16 == 0, "rows of a tile are whole 16-byte copies");
    static_assert(kThreads % kPerRow == 0 && kRows % kStepRows == 0, "every thread makes equally many copies");
    const int thread = static_cast<int>(threadIdx.x), row = thread / kPerRow, k = thread % kPerRow * kPerCopy;
    const int bytes = clamp_to(depth - k, kPerCopy) * static_cast<int>(sizeof(T));
    const T* from = data + (row0 + row) * x.stride_row + (k0 + k);
    T* to = tile + row * kPitch + k;
#pragma unroll
    for (int step = 0; step < kRows / kStepRows; ++step, from += kStepRows * x.stride_row) {
      const bool inside = row + step * kStepRows < rows && bytes > 0;
      // a copy of nothing still wants an address: the first element's is always good
      copy_async_16(to + step * kStepRows * kPitch, inside ? from : data, inside ? bytes : 0);
    }
  } else {
    using Path = Walk<kRows, kK, kThreads>;
    const Path at(x);
    const T* from = data + (row0 + at.row) * x.stride_row + (k0 + at.k) * x.stride_k;
    const int64_t advance = at.step_row * x.stride_row + at.step_k * x.stride_k;
    T* to = tile + at.row * kPitch + at.k;
    const int to_advance = at.step_row * kPitch + at.step_k;
#pragma unroll 4
    for (int step = 0; step < Path::kSteps; ++step, from += advance, to += to_advance) {
      T value{};
      if (at.row + step * at.step_row < rows && at.k + step * at.step_k < depth) value = load_global(from);
      store_shared(to, value);
    }
  }
}

}  // namespace gradshield
