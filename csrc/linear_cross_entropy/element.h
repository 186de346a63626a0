// One element of a matrix of any dtype, for what is done once a token.
#pragma once

#include <cmath>
#include <cstring>

#include "linear_cross_entropy/head.h"

namespace gsf::head {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 31, rest = half & 1023;
  if (exponent == 0) {
    const float size = std::ldexp(static_cast<float>(rest), -24);
    return sign != 0 ? -size : size;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | rest << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline double element(const Matrix& x, int64_t row, int64_t col) {
  const char* at = x.at(row, col);
  float value;
  if (x.dtype == DType::kFloat32) {
    std::memcpy(&value, at, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  if (x.dtype == DType::kFloat16) return half_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  std::memcpy(&value, &wide, 4);
  return value;
}

}  // namespace gsf::head
