// Everything a kernel asks of the hardware, in one place: memory, barriers, shuffles, asynchronous copies, matrix
// instructions. nvcc compiles the instructions below; g++ with GRADSHIELD_EMULATOR takes the same names from the
// emulator, which checks every access. Kernels touch global and shared memory through these functions alone.
#pragma once

#if defined(GRADSHIELD_EMULATOR)
#include "emulator/device.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace gradshield {

template <class T>
__device__ __forceinline__ T load_global(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store_global(T* p, T value) {
  *p = value;
}
template <class T>
__device__ __forceinline__ T load_shared(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store_shared(T* p, T value) {
  *p = value;
}

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char buffer[];
  return buffer;
}

__device__ __forceinline__ void sync_block() {
  __syncthreads();
}
__device__ __forceinline__ void sync_warp() {
  __syncwarp();
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros, past the registers and the first cache.
__device__ __forceinline__ void copy_async_16(void* to_shared, const void* from_global, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to_shared))),
      "l"(from_global), "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kNewestLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewestLeft) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and receives of each
// matrix the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c [16, 8] = (first ? 0 : c) + a [16, 16] b [16, 8], float32 sums. A chain that starts from the constant zero needs no
// registers cleared: `first` is known where loops are unrolled.
template <bool kBfloat>
__device__ __forceinline__ void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                 bool first) {
  const float c0 = first ? 0.0f : c[0], c1 = first ? 0.0f : c[1], c2 = first ? 0.0f : c[2], c3 = first ? 0.0f : c[3];
  if constexpr (kBfloat) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
  }
}

template <class Params>
cudaError_t launch(const char*, void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const void* function = reinterpret_cast<const void*>(kernel);
  // Above 48 KiB a kernel has to ask.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes, stream);
}

}  // namespace gradshield
#endif
