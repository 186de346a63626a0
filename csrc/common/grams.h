// Products of a bfloat16 matrix's rows with each other, by AVX-512's multiplication of pairs along the rows.
//
// Maths    16 lanes each add up every 16th pair of x[t, k] x[u, k], each product with one rounding; then the lanes add
// Traffic  a row is read once for every kSide rows beside it, from L2, as it lies: nothing is packed or transposed
//
// Numbers and sums below 2^-126 count as zero: the caller bounds what that costs (ghost_norm_sq/cpu.cpp).
#pragma once

#include "common/matrix.h"
#include "common/simd.h"

namespace gsf::GSF_ISA {

constexpr int64_t kSide = 4;  // rows and columns of a register block: 16 sums, 8 operands

// Lane 4 i + j of the result is the sum of the lanes of sums[i][j].
inline __m512 lanes_of(const __m512 (&sums)[kSide][kSide]) {
  __m512 rows[kSide];
#pragma GCC unroll 4
  for (int i = 0; i < kSide; ++i) {
    const __m512 one = _mm512_add_ps(_mm512_unpacklo_ps(sums[i][0], sums[i][1]),
                                     _mm512_unpackhi_ps(sums[i][0], sums[i][1])),
                 two = _mm512_add_ps(_mm512_unpacklo_ps(sums[i][2], sums[i][3]),
                                     _mm512_unpackhi_ps(sums[i][2], sums[i][3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(one), _mm512_castps_pd(two)),
                  high = _mm512_unpackhi_pd(_mm512_castps_pd(one), _mm512_castps_pd(two));
    rows[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  }
  const auto fold = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  return fold(fold(rows[0], rows[1]), fold(rows[2], rows[3]));
}

// block[t - first, u - column] = x[t] . x[u] for t in [first, last) and u in [column, column + width), u <= t; what
// else is in the block may be anything. `ld` and the rows of `block` are whole register blocks.
inline void gram(const Matrix& x, int64_t first, int64_t last, int64_t column, int64_t width, float* block,
                 int64_t ld) {
  const auto row = [&x](int64_t t, int64_t end) { return x.at(t < end ? t : end - 1, 0); };
  for (int64_t t = first; t < last; t += kSide) {
    const char* left[kSide];
    for (int i = 0; i < kSide; ++i) left[i] = row(t + i, last);
    const int64_t end = column + width < t + kSide ? column + width : t + kSide;
    for (int64_t u = column; u < end; u += kSide) {
      const char* right[kSide];
      for (int j = 0; j < kSide; ++j) right[j] = row(u + j, column + width);
      __m512 sums[kSide][kSide];
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kSide; ++j) sums[i][j] = _mm512_setzero_ps();
      for (int64_t k = 0; k < x.cols; k += 32) {
        const __mmask32 here = x.cols - k >= 32 ? ~__mmask32{0} : (__mmask32{1} << (x.cols - k)) - 1;
        __m512bh l[kSide], r[kSide];
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) {
          l[i] = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(here, left[i] + 2 * k));
          r[i] = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(here, right[i] + 2 * k));
        }
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < kSide; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], l[i], r[j]);
      }
      const __m512 all = lanes_of(sums);
      float* to = block + (t - first) * ld + u - column;
      _mm_storeu_ps(to, _mm512_castps512_ps128(all));
      _mm_storeu_ps(to + ld, _mm512_extractf32x4_ps(all, 1));
      _mm_storeu_ps(to + 2 * ld, _mm512_extractf32x4_ps(all, 2));
      _mm_storeu_ps(to + 3 * ld, _mm512_extractf32x4_ps(all, 3));
    }
  }
}

}  // namespace gsf::GSF_ISA
