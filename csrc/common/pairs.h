// The product of two bfloat16 factors by AVX-512's multiplication of pairs, as exact as float32 multiply-adds.
//
// Maths    an instruction adds x[t, k] B[k, c] and x[t, k + 1] B[k + 1, c] to out[t, c], each with one rounding
// Traffic  x: one read (copied to a 6 KB block that stays in L1); B: 2 bytes an element for every kRows tokens, from
// L2;
//          out: one read and one write for every kPairDepth of k
//
// As on matrix tiles, subnormal numbers count as zero: rows take the float32 product instead where one beside them
// holds such a number, or where a result is not finite; B's columns are scaled for it (split.h).
#pragma once

#include "common/split.h"

namespace gsf::GSF_ISA {

constexpr int64_t kPairDepth = 256;  // of k, between two additions to the total

// Copies kRows rows, kPairDepth numbers apart, idle ones and the rest of the last step as zeros; false where a number
// is subnormal.
inline bool copy_rows(const Matrix& x, int64_t t, int64_t k, int64_t rows, int64_t n, uint16_t* to) {
  Subnormals16 seen;
  for (int64_t r = 0; r < kRows; ++r) {
    const char* from = r < rows ? x.at(t + r, k) : nullptr;
    for (int64_t i = 0; i < n; i += kStep) {
      const __mmask32 here = from == nullptr ? 0 : n - i >= kStep ? ~__mmask32{0} : (__mmask32{1} << (n - i)) - 1;
      const __m512i bits = _mm512_maskz_loadu_epi16(here, from + 2 * i);
      seen.see(bits);
      _mm512_storeu_si512(to + r * kPairDepth + i, bits);
    }
  }
  return !seen.any();
}

// out = or += unscale (kRows rows of x, kPairDepth apart, times `Panels` panels over some steps); false if a result is
// not finite. Rows are fetched ahead as in `block`.
template <int Panels>
inline bool block_of_pairs(const uint16_t* x, const uint16_t* const (&b)[2], const float* unscale, int64_t steps,
                           int64_t rows, float* out, int64_t ld, bool first, const char* ahead, int64_t ahead_step) {
  __m512 acc[kRows][Panels];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) acc[r][p] = _mm512_setzero_ps();
  for (int64_t pair = 0, row = 0; pair < steps * kTile; ++pair) {
    if (ahead != nullptr) {
      __builtin_prefetch(ahead + row * ahead_step);
      if (++row == kRows) row = 0, ahead += 64;
    }
    __m512bh right[Panels];
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p)
      right[p] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b[p] + pair * 2 * kPanel));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      int32_t both;
      __builtin_memcpy(&both, x + r * kPairDepth + 2 * pair, 4);
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 2
      for (int p = 0; p < Panels; ++p) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], left, right[p]);
    }
  }
  __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    if (r < rows)
#pragma GCC unroll 2
      for (int p = 0; p < Panels; ++p) {
        float* to = out + r * ld + p * kPanel;
        __m512 sum = _mm512_mul_ps(acc[r][p], _mm512_loadu_ps(unscale + p * kPanel));
        if (!first) sum = _mm512_add_ps(_mm512_loadu_ps(to), sum);
        largest = _mm512_max_epu32(largest, _mm512_slli_epi32(_mm512_castps_si512(sum), 1));
        _mm512_storeu_ps(to, sum);
      }
  return _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32(static_cast<int>(0xff000000u))) == 0;
}

// kRows rows; false where they must take the float32 product.
inline bool rows_of_pairs(const Matrix& x, const Packed& b, int64_t t, int64_t last, int64_t panel, int64_t panel_end,
                          float* out, int64_t ld, uint16_t* left) {
  const int64_t depth = x.cols, rows = least(kRows, last - t), of_panel = ceil_div(depth, kStep) * kTileHalves;
  for (int64_t k = 0; k < depth; k += kPairDepth) {
    const int64_t n = least(kPairDepth, depth - k), steps = ceil_div(n, kStep), next = k + n < depth ? t : t + kRows;
    if (!copy_rows(x, t, k, rows, n, left)) return false;
    const char* ahead = next + kRows <= last ? x.at(next, next == t ? k + n : 0) : nullptr;
    for (int64_t j = panel; j < panel_end; j += 2) {
      const uint16_t* one = b.split + j * of_panel + k / kStep * kTileHalves;
      const uint16_t* const right[2] = {one, one + of_panel};
      float* to = out + (j - panel) * kPanel;
      const bool finite = j + 1 < panel_end ? block_of_pairs<2>(left, right, b.unscale + j * kPanel, steps, rows, to,
                                                                ld, k == 0, ahead, 2 * x.row_stride)
                                            : block_of_pairs<1>(left, right, b.unscale + j * kPanel, steps, rows, to,
                                                                ld, k == 0, ahead, 2 * x.row_stride);
      if (!finite) return false;
      ahead = nullptr;
    }
  }
  return true;
}

inline void product_or_pairs(const Matrix& x, const Packed& b, int64_t first, int64_t last, int64_t panel,
                             int64_t panel_end, float* out, int64_t ld, float* scratch) {
  if (b.split == nullptr || x.dtype != DType::kBFloat16 || x.col_stride != 1 || x.cols == 0)
    return product(x, b, first, last, panel, panel_end, out, ld, scratch);
  static_assert(kRows * kPairDepth / 2 <= kScratchFloats, "the scratch holds the rows");
  uint16_t* left = reinterpret_cast<uint16_t*>(scratch);
  for (int64_t t = first; t < last; t += kRows) {
    float* to = out + (t - first) * ld;
    if (!rows_of_pairs(x, b, t, last, panel, panel_end, to, ld, left))
      product(x, b, t, least(t + kRows, last), panel, panel_end, to, ld, scratch);
  }
}

}  // namespace gsf::GSF_ISA
