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

__host__ __device__ inline int64_t ceil_div(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}

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

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(Bf16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Half x) {
  return half_bits_to_float(x.bits);
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

// The terms of two neighbours along k, packed as the matrix instruction wants them: the lower k in the lower half.
// Terms are cut, not rounded: 8 + 8 + 8 significand bits hold float32's 24, no term can overflow, and the upper halves
// of two registers are packed in one instruction. An infinity leaves a NaN as its second term, so its sums become NaN.
template <int kTerms>
__device__ __forceinline__ void split_pair(float x0, float x1, uint32_t (&packed)[kTerms]) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    const uint32_t upper0 = float_bits(x0) & 0xffff0000u, upper1 = float_bits(x1) & 0xffff0000u;
    packed[i] = upper0 >> 16 | upper1;
    x0 -= bits_float(upper0);
    x1 -= bits_float(upper1);
  }
}

}  // namespace gradshield
