// The element types of the ops' inputs, their exact conversions to float32, and exact splits into bfloat16 terms.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/platform.cuh"
#include "common/runtime.h"

namespace gradshield {

struct Half {
  uint16_t bits;
};

struct Bf16 {
  uint16_t bits;
};

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = kFloat32;
};
template <>
struct DtypeOf<Half> {
  static constexpr Dtype value = kFloat16;
};
template <>
struct DtypeOf<Bf16> {
  static constexpr Dtype value = kBfloat16;
};

__host__ __device__ inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

__device__ __forceinline__ uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

__device__ __forceinline__ float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) { return half_bits_to_float(x.bits); }

// Truncation, not rounding: 8 + 8 + 8 significand bits hold float32's 24 and no term can overflow. A NaN whose payload
// lies in the low half would truncate to infinity, so it is replaced.
__device__ __forceinline__ uint16_t truncate_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : static_cast<uint16_t>(bits >> 16);
}

// x = sum of the terms, largest first: one bfloat16 holds a bfloat16, two a float16 (11 bits, exponents well inside),
// three a float32 of magnitude 2^-109 or more (below, the last term's low bits are under bfloat16's smallest number).
template <class T>
struct Bf16Terms;
template <>
struct Bf16Terms<Bf16> {
  static constexpr int value = 1;
};
template <>
struct Bf16Terms<Half> {
  static constexpr int value = 2;
};
template <>
struct Bf16Terms<float> {
  static constexpr int value = 3;
};

template <int kTerms>
__device__ __forceinline__ void split_bf16(float x, uint16_t (&terms)[kTerms]) {
  const bool finite = (float_bits(x) & 0x7f800000u) != 0x7f800000u;
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = truncate_to_bf16(x);
    x = finite ? x - bits_float(static_cast<uint32_t>(terms[i]) << 16) : 0.0f;
  }
}

// Two neighbours along k, packed as the matrix instruction wants them: the lower k in the lower half.
template <int kTerms>
__device__ __forceinline__ void split_pair(float x0, float x1, uint32_t (&packed)[kTerms]) {
  uint16_t t0[kTerms], t1[kTerms];
  split_bf16(x0, t0);
  split_bf16(x1, t1);
#pragma unroll
  for (int i = 0; i < kTerms; ++i) packed[i] = t0[i] | static_cast<uint32_t>(t1[i]) << 16;
}

}  // namespace gradshield
