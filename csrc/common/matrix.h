// What crosses from Python: raw pointers, sizes, strides and a type code. No torch headers anywhere in csrc.
#pragma once

#include <cstdint>

namespace gsf {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Element (i, j) lies row_stride * i + col_stride * j elements behind data. Strides count elements and are not
// negative.
struct Matrix {
  const char* data = nullptr;
  int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
  DType dtype = DType::kFloat32;

  const char* at(int64_t i, int64_t j) const { return data + (i * row_stride + j * col_stride) * size_of(dtype); }
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride, dtype}; }
  Matrix rows_from(int64_t first, int64_t count) const {
    return {at(first, 0), count, cols, row_stride, col_stride, dtype};
  }
};

inline int64_t least(int64_t x, int64_t y) {
  return x < y ? x : y;
}
inline int64_t most(int64_t x, int64_t y) {
  return x > y ? x : y;
}
inline int64_t ceil_div(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}

}  // namespace gsf
