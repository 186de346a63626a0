// A tile of C = A B^T in float32 multiply-adds, for float32 activations and every other pair of dtypes.
//
// Maths    C[m, n] = sum_k A[m, k] B[n, k], each element converted exactly to float32
// Sums     a chain of kK = 16 multiply-adds, then the steps add up: the rounding error grows with k / 16 + 16, not k
// Traffic  a block reads kM rows of A and kN rows of B once; the next step's elements wait in registers meanwhile
#pragma once

#include "common/operand.cuh"

namespace gradshield {

template <int kM_, int kN_>
struct FmaTile {
  static constexpr int kM = kM_, kN = kN_, kK = 16;
  static constexpr int kThreads = kM / 4 * (kN / 4), kBlocks = 512 / kThreads;
  static constexpr int kValues = 16;  // 4 x 4 of C, for each thread
  // Four floats beyond a row: rows stay aligned to 16 bytes.
  static constexpr int kPitchA = kM + 4, kPitchB = kN + 4;
  static constexpr int kSharedBytes = kK * (kPitchA + kPitchB) * 4;
  static constexpr int kFetchA = kM * kK / kThreads, kFetchB = kN * kK / kThreads;

  static_assert(kThreads % 32 == 0 && 512 % kThreads == 0, "whole warps, and 512 threads on a multiprocessor");

  static __device__ __forceinline__ int row_of(int i) { return static_cast<int>(threadIdx.x) / (kN / 4) * 4 + i / 4; }
  static __device__ __forceinline__ int column_of(int i) {
    return static_cast<int>(threadIdx.x) % (kN / 4) * 4 + i % 4;
  }

  template <class T, int kRows, int kFetch>
  static __device__ __forceinline__ void fetch_as(float (&held)[kFetch], const Operand& x, int64_t row0, int64_t k0,
                                                  int64_t k_end) {
    const Walk<kRows, kK, kThreads> at(x);
    const int rows = clamp_to(x.rows - row0, kRows), depth = clamp_to(k_end - k0, kK);
    const T* from = static_cast<const T*>(x.data) + (row0 + at.row) * x.stride_row + (k0 + at.k) * x.stride_k;
    const int64_t advance = at.step_row * x.stride_row + at.step_k * x.stride_k;
#pragma unroll
    for (int step = 0; step < kFetch; ++step, from += advance) {
      const bool inside = at.row + step * at.step_row < rows && at.k + step * at.step_k < depth;
      held[step] = inside ? to_float(load_global(from)) : 0.0f;
    }
  }

  template <int kRows, int kFetch>
  static __device__ __forceinline__ void fetch(float (&held)[kFetch], const Operand& x, int64_t row0, int64_t k0,
                                               int64_t k_end) {
    if (x.dtype == kFloat32) {
      fetch_as<float, kRows>(held, x, row0, k0, k_end);
    } else if (x.dtype == kBfloat16) {
      fetch_as<Bf16, kRows>(held, x, row0, k0, k_end);
    } else {
      fetch_as<Half, kRows>(held, x, row0, k0, k_end);
    }
  }

  // tile [kK][kPitch]: the product reads four neighbouring rows of x at one k.
  template <int kRows, int kPitch, int kFetch>
  static __device__ __forceinline__ void put(float* tile, const float (&held)[kFetch], const Operand& x) {
    const Walk<kRows, kK, kThreads> at(x);
    float* to = tile + at.k * kPitch + at.row;
    const int advance = at.step_k * kPitch + at.step_row;
#pragma unroll
    for (int step = 0; step < kFetch; ++step, to += advance) store_shared(to, held[step]);
  }

  // sums = the thread's values of A[row_a : row_a + kM, k_begin : k_end] B[row_b : row_b + kN, k_begin : k_end]^T.
  // Ends with a barrier: `shared` is free again.
  static __device__ __forceinline__ void product(char* shared, const Operand& a, const Operand& b, int64_t row_a,
                                                 int64_t row_b, int64_t k_begin, int64_t k_end,
                                                 float (&sums)[kValues]) {
    float* tile_a = reinterpret_cast<float*>(shared);
    float* tile_b = tile_a + kK * kPitchA;
    const int m = static_cast<int>(threadIdx.x) / (kN / 4) * 4, n = static_cast<int>(threadIdx.x) % (kN / 4) * 4;
    float held_a[kFetchA], held_b[kFetchB];
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i] = 0.0f;
    fetch<kM>(held_a, a, row_a, k_begin, k_end);
    fetch<kN>(held_b, b, row_b, k_begin, k_end);
    for (int64_t k0 = k_begin; k0 < k_end; k0 += kK) {
      put<kM, kPitchA>(tile_a, held_a, a);
      put<kN, kPitchB>(tile_b, held_b, b);
      sync_block();
      if (k0 + kK < k_end) {
        fetch<kM>(held_a, a, row_a, k0 + kK, k_end);
        fetch<kN>(held_b, b, row_b, k0 + kK, k_end);
      }
      float chain[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) chain[i] = 0.0f;
#pragma unroll 8
      for (int k = 0; k < kK; ++k) {
        const float4 x = load_shared(reinterpret_cast<const float4*>(tile_a + k * kPitchA + m));
        const float4 y = load_shared(reinterpret_cast<const float4*>(tile_b + k * kPitchB + n));
        const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < kValues; ++i) chain[i] = fmaf(xs[i / 4], ys[i % 4], chain[i]);
      }
#pragma unroll
      for (int i = 0; i < kValues; ++i) sums[i] += chain[i];
      sync_block();
    }
  }
};

}  // namespace gradshield
