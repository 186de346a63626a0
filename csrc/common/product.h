// The product every op is built on, in float32 multiply-adds: x [tokens, depth] times packed B [depth, cols].
//
// Maths    out[t, c] = sum_k x[t, k] B[k, c]
// Traffic  x: one read for each call (converted to float32 in a 6 KB block that stays in L1); B: one read for every
//          kRows tokens, from L2; out: one read and one write for every kDepth of k
//
// The sum over k runs in blocks of kDepth that are added up afterwards, so that no rounding chain is longer than
// kDepth + depth / kDepth. Its order depends on k alone: not on the tokens beside, not on the thread.
#pragma once

#include "common/kernels.h"
#include "common/simd.h"

namespace gsf::GSF_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 12;  // 12 rows x 2 panels fill 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6;  // 6 rows x 1 panel of two registers fill 12 of 16
#else
constexpr int kRows = 3;
#endif
constexpr bool kTwoPanels = kRows == 12;  // whether a register block has two panels
constexpr int64_t kDepth = 128;

#if defined(__AVX512F__)
// 16 x 16 transpose in registers: rows of `p`, `stride` elements apart, become columns.
inline void transpose16(const char* p, int64_t stride, DType dtype, float* out) {
  __m512 r[16], s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = load(p + i * stride * size_of(dtype), dtype).v;
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(out + 16 * i, _mm512_shuffle_f32x4(s[i], s[i + 8], 0x88));
    _mm512_storeu_ps(out + 16 * (i + 8), _mm512_shuffle_f32x4(s[i], s[i + 8], 0xdd));
    _mm512_storeu_ps(out + 16 * (i + 4), _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0x88));
    _mm512_storeu_ps(out + 16 * (i + 12), _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0xdd));
  }
}
#endif

// Rows [k, k + n) of panel j of B as [n][16] float32, padding columns zero.
inline void pack_block(const Matrix& b, int64_t j, int64_t k, int64_t n, float* out) {
  const int64_t first = j * kPanel, width = least(kPanel, b.cols - first);
  int64_t done = 0;
  if (width == kPanel && b.col_stride == 1) {
    for (; done < n; ++done) store(out + done * kPanel, load(b.at(k + done, first), b.dtype));
  }
#if defined(__AVX512F__)
  if (width == kPanel && b.row_stride == 1)
    for (; done + 16 <= n; done += 16) transpose16(b.at(k + done, first), b.col_stride, b.dtype, out + done * kPanel);
#endif
  for (; done < n; ++done)
    for (int64_t c = 0; c < kPanel; ++c)
      out[done * kPanel + c] = c < width ? load1(b.at(k + done, first + c), b.dtype) : 0.0f;
}

inline void pack(const Matrix& b, int64_t panel, int64_t panel_end, float* panels) {
  for (int64_t j = panel; j < panel_end; ++j) pack_block(b, j, 0, b.rows, panels + j * b.rows * kPanel);
}

// One register block: kRows rows of x, kDepth floats apart, times `Panels` panels over n steps of k. One pointer for
// all rows: a dozen of them would not fit the registers, and each would be loaded again at every step. Meanwhile kRows
// rows from `ahead` on, `ahead_step` bytes apart, come into the cache, a line at each step; null: nothing more to come.
template <int Panels>
inline void block(const float* x, const float* const (&b)[2], int64_t n, int64_t rows, float* out, int64_t ld,
                  bool first, const char* ahead, int64_t ahead_step) {
  Vec acc[kRows][Panels];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) acc[r][p] = zero();
  for (int64_t k = 0, row = 0; k < n; ++k) {
    if (ahead != nullptr) {
      __builtin_prefetch(ahead + row * ahead_step);
      if (++row == kRows) row = 0, ahead += 64;
    }
    Vec right[Panels];
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) right[p] = load(b[p] + k * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec left = set1(x[r * kDepth + k]);
#pragma GCC unroll 2
      for (int p = 0; p < Panels; ++p) acc[r][p] = fma(left, right[p], acc[r][p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    if (r < rows)
#pragma GCC unroll 2
      for (int p = 0; p < Panels; ++p) {
        float* to = out + r * ld + p * kPanel;
        store(to, first ? acc[r][p] : add(load(to), acc[r][p]));
      }
}

inline void clear(float* out, int64_t ld, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) out[r * ld + c] = 0.0f;
}

inline void product(const Matrix& x, const Packed& b, int64_t first, int64_t last, int64_t panel, int64_t panel_end,
                    float* out, int64_t ld, float* scratch) {
  const int64_t depth = x.cols, step = x.row_stride * size_of(x.dtype);
  float* converted = scratch;                // [kRows][kDepth]
  float* packed = scratch + kRows * kDepth;  // [2][kDepth][16]
  static_assert(kRows * kDepth + 2 * kDepth * kPanel <= kScratchFloats, "the scratch holds both blocks");
  if (depth == 0) clear(out, ld, last - first, (panel_end - panel) * kPanel);
  for (int64_t t = first; t < last; t += kRows) {
    const int64_t rows = least(kRows, last - t);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t n = least(kDepth, depth - k), next = k + n < depth ? t : t + kRows;
      const bool more = x.col_stride == 1 && next + kRows <= last;
      for (int64_t r = 0; r < rows; ++r) convert(converted + r * kDepth, x.at(t + r, k), n, x.col_stride, x.dtype);
      clear(converted + rows * kDepth, kDepth, kRows - rows, n);  // idle rows: multiplied, not stored
      for (int64_t j = panel; j < panel_end; j += 2) {
        const int64_t width = least(2, panel_end - j);
        const float* right[2];
        for (int64_t p = 0; p < 2; ++p) {
          if (p >= width) {
            right[p] = right[0];
          } else if (b.panels != nullptr) {
            right[p] = b.panels + ((j + p) * depth + k) * kPanel;
          } else {
            pack_block(b.source, j + p, k, n, packed + p * kDepth * kPanel);
            right[p] = packed + p * kDepth * kPanel;
          }
        }
        float* to = out + (t - first) * ld + (j - panel) * kPanel;
        const char* ahead = more && j == panel ? x.at(next, next == t ? k + n : 0) : nullptr;
        if (kTwoPanels && width == 2) {
          block<2>(converted, right, n, rows, to, ld, k == 0, ahead, step);
          continue;
        }
        for (int64_t p = 0; p < width; ++p) {
          const float* const one[2] = {right[p], right[p]};
          block<1>(converted, one, n, rows, to + p * kPanel, ld, k == 0, p == 0 ? ahead : nullptr, step);
        }
      }
    }
  }
}

// Four rows of `out` at a time: four independent chains of multiply-adds hide one another's latency.
inline void outer(const float* left, int64_t left_ld, const float* right, int64_t right_ld, int64_t tokens,
                  int64_t first, int64_t last, int64_t cols, float* out, int64_t out_ld) {
  for (int64_t i = first; i < last; i += 4)
    for (int64_t c = 0; c < cols; c += kPanel) {
      const float* column[4];
      for (int64_t r = 0; r < 4; ++r) column[r] = left + (i + r < last ? i + r : i);
      Vec total[4] = {zero(), zero(), zero(), zero()};
      for (int64_t t = 0; t < tokens; t += kDepth) {
        Vec part[4] = {zero(), zero(), zero(), zero()};
        for (int64_t u = t; u < least(t + kDepth, tokens); ++u) {
          const Vec row = load(right + u * right_ld + c);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) part[r] = fma(set1(column[r][u * left_ld]), row, part[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) total[r] = add(total[r], part[r]);
      }
      for (int64_t r = 0; r < least(4, last - i); ++r) {
        float lanes[kPanel];
        store(lanes, total[r]);
        for (int64_t k = 0; k < least(kPanel, cols - c); ++k) out[(i + r) * out_ld + c + k] = lanes[k];
      }
    }
}

}  // namespace gsf::GSF_ISA
