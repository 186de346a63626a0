// Row-wise sums: what turns products into position terms.
#pragma once

#include "common/kernels.h"
#include "common/simd.h"

namespace gsf::GSF_ISA {

constexpr int64_t kChunk = 1024;  // elements of a row that are converted at once

// sum_c x[c] y[c] in chunks; rows that are not contiguous float32 pass through scratch [2][kChunk]
inline float row_dot(const char* x, int64_t x_step, DType x_type, const char* y, int64_t y_step, DType y_type,
                     int64_t n, float* scratch) {
  Vec total = zero();
  float tail = 0.0f;
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t width = least(kChunk, n - c);
    const char* from[2] = {x + c * x_step * size_of(x_type), y + c * y_step * size_of(y_type)};
    DType types[2] = {x_type, y_type};
    const int64_t steps[2] = {x_step, y_step};
    for (int s = 0; s < 2; ++s)
      if (steps[s] != 1) {
        convert(scratch + s * kChunk, from[s], width, steps[s], types[s]);
        from[s] = reinterpret_cast<const char*>(scratch + s * kChunk);
        types[s] = DType::kFloat32;
      }
    const int64_t x_size = size_of(types[0]), y_size = size_of(types[1]);
    Vec part[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 64 <= width; i += 64)
#pragma GCC unroll 4
      for (int64_t v = 0; v < 4; ++v)
        part[v] = fma(load(from[0] + (i + 16 * v) * x_size, types[0]), load(from[1] + (i + 16 * v) * y_size, types[1]),
                      part[v]);
    for (; i + 16 <= width; i += 16)
      part[0] = fma(load(from[0] + i * x_size, types[0]), load(from[1] + i * y_size, types[1]), part[0]);
    for (; i < width; ++i) tail += load1(from[0] + i * x_size, types[0]) * load1(from[1] + i * y_size, types[1]);
    total = add(total, add(add(part[0], part[1]), add(part[2], part[3])));
  }
  return sum(total) + tail;
}

inline float dot(const Matrix& x, int64_t row, const Matrix& y, int64_t other, float* scratch) {
  return row_dot(x.at(row, 0), x.col_stride, x.dtype, y.at(other, 0), y.col_stride, y.dtype, x.cols, scratch);
}

inline void scale_dots(const Matrix* x, const Matrix& g, int64_t row, const Matrix& r, float* u, float* scratch) {
  float *scaled = scratch, *other = scratch + kChunk, *rest = scratch + 2 * kChunk;
  for (int64_t k = 0; k < r.rows; ++k) u[k] = 0.0f;
  for (int64_t c = 0; c < g.cols; c += kChunk) {
    const int64_t width = least(kChunk, g.cols - c);
    convert(scaled, g.at(row, c), width, g.col_stride, g.dtype);
    if (x != nullptr) {
      convert(other, x->at(row, c), width, x->col_stride, x->dtype);
      int64_t i = 0;
      for (; i + 16 <= width; i += 16) store(scaled + i, mul(load(scaled + i), load(other + i)));
      for (; i < width; ++i) scaled[i] *= other[i];
    }
    const char* from = reinterpret_cast<const char*>(scaled);
    for (int64_t k = 0; k < r.rows; ++k)
      u[k] += row_dot(from, 1, DType::kFloat32, r.at(k, c), r.col_stride, r.dtype, width, rest);
  }
}

inline void row_dots(const Matrix& z, int64_t column, int64_t width, const float* w, int64_t ld, int64_t first,
                     int64_t last, float* u, int64_t u_stride, float* scratch) {
  for (int64_t t = first; t < last; ++t)
    u[(t - first) * u_stride] +=
        row_dot(z.at(t, column), z.col_stride, z.dtype, reinterpret_cast<const char*>(w + (t - first) * ld), 1,
                DType::kFloat32, width, scratch);
}

// Lanes of the products add up in one register over a direction's panels, then as a tree.
inline void combine(const Matrix& z, const float* w, int64_t ld, const Members& member, int64_t first, int64_t last,
                    float* u, float* scratch) {
  const bool as_is = z.dtype == DType::kFloat32 && z.col_stride == 1 && z.cols % kPanel == 0;
  for (int64_t c = z.cols; c < member.columns; ++c) scratch[c] = 0.0f;
  for (int64_t t = first; t < last; ++t) {
    const float *left = scratch, *right = w + (t - first) * ld;
    if (as_is) {
      left = reinterpret_cast<const float*>(z.at(t, 0));
    } else {
      convert(scratch, z.at(t, 0), z.cols, z.col_stride, z.dtype);
    }
    float* to = u + (t - first) * member.directions;
    for (int64_t k = 0; k < member.directions; ++k) {
      const float* belongs = member.of + k * member.columns;
      Vec total = zero();
      for (int64_t c = member.begin[k] * kPanel; c < member.end[k] * kPanel; c += kPanel)
        total = fma(mul(load(left + c), load(right + c)), load(belongs + c), total);
      to[k] = sum(total);
    }
  }
}

}  // namespace gsf::GSF_ISA
