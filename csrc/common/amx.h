// The product on bfloat16 matrix tiles, as exact as float32 multiply-adds.
//
// Traffic  x: one read where it lies (parts or copies of 32 rows stay in L1), and one from L1 or L2 for every further
//          panel; B: 2 bytes an element and part for every 32 rows, from L2; out: one read and one write for every 768
//          (bfloat16 in place; 256 for more than 3 panels), 512 (bfloat16 copied) or 192 (float32) of k
//
// What can be flushed to zero is a product below 2^-126 of scaled factors (amx_left.h, split.h): at most
// depth 2^-166 max |B[:, c]| in a result, far below one rounding for any x that is not subnormal.
//
// Rows take the float32 product instead where one beside them holds a subnormal number, or where a result is not
// finite: an infinity times a part that is zero is a NaN, and scaled factors overflow before float32 numbers do.
#pragma once

#include "common/amx_multiply.h"

namespace gsf::amx {

constexpr int64_t kMarks = 64;

// out = or += unscale acc for one panel; false if a result is not finite.
inline bool add_tiles(const float* acc, const float* unscale, float left_unscale, int64_t rows, bool first, float* out,
                      int64_t ld) {
  const __m512 by = _mm512_loadu_ps(unscale), left_by = _mm512_set1_ps(left_unscale);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * ld;
    __m512 sum = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(acc + 16 * r), left_by), by);
    if (!first) sum = _mm512_add_ps(_mm512_loadu_ps(to), sum);
    largest = _mm512_max_epu32(largest, _mm512_slli_epi32(_mm512_castps_si512(sum), 1));
    _mm512_storeu_ps(to, sum);
  }
  return _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32(static_cast<int>(0xff000000u))) == 0;
}

template <typename Left, int kRight>
inline void product_tiles(const Matrix& x, const Packed& b, int64_t first, int64_t last, int64_t panel,
                          int64_t panel_end, float* out, int64_t ld, float* scratch) {
  const bool in_place = Left::in_place(x);
  const int64_t depth = x.cols, steps = ceil_div(depth, kStep), size = size_of(x.dtype);
  // many panels: few steps, so that rows in place stay in L1 from one panel to the next
  const int64_t in_one = !in_place ? Left::kCopiedSteps : panel_end - panel > 3 ? least(8, Left::kSteps) : Left::kSteps;
  const int64_t stride = ceil_div(steps, ceil_div(steps, in_one));  // blocks of equal length, at most that
  const int64_t row = in_place ? Left::kRow : Left::kCopiedRow;
  float* acc = scratch;                                         // [2][16][16]
  uint16_t* copy = reinterpret_cast<uint16_t*>(scratch + 512);  // kHalves
  static_assert(512 + Left::kHalves / 2 <= kScratchFloats, "the scratch holds both");
  bool special[kMarks] = {};
  {
    const Tiles configured;
    for (int64_t s = 0; s < steps; s += stride)
      for (int64_t t = first; t < last; t += kPair) {
        bool& marked = special[(t - first) / kPair];
        if (marked) continue;
        const int64_t k = s * kStep, n = least(depth - k, stride * kStep), rows = least(kPair, last - t);
        const int64_t whole = in_place ? rows / kTile : 0, tiles = ceil_div(rows, kTile);
        if (whole < tiles) marked = !Left::copy(x, t + whole * kTile, k, rows - whole * kTile, n, copy, row);
        if (marked) continue;
        Rows left[2];
        for (int64_t i = 0; i < tiles; ++i)
          left[i] = i < whole ? Rows{reinterpret_cast<const uint16_t*>(x.at(t + i * kTile, k)), x.row_stride, 0}
                              : Rows{copy + (i - whole) * kTile * row, row, kPair * row};
        // next come the tokens after these; after the last of them the first again, deeper; at the end, other tokens
        const bool wraps = t + kPair >= last, deeper = wraps && s + stride < steps;
        const int64_t next_t = deeper ? first : t + kPair, next_k = deeper ? k + n : wraps ? 0 : k;
        Ahead ahead{nullptr, size * x.row_stride, least(kPair, x.rows - next_t), size * (depth - next_k)};
        if (next_t < x.rows) ahead.from = x.at(next_t, next_k);
        const int64_t count = least(stride, steps - s);
        for (int64_t j = panel; j < panel_end && !marked; ++j) {
          const uint16_t* right = b.split + (j * steps + s) * kRight * kTileHalves;
          if (j > panel) {
            multiply<Left::kParts, kRight>(left, tiles, right, count, acc, [](int64_t) {});
          } else if (whole > 0) {
            Subnormals16 seen;
            multiply<Left::kParts, kRight>(left, tiles, right, count, acc, [&](int64_t step) {
              for (int64_t r = 0; r < whole * kTile; ++r)
                seen.see(_mm512_load_si512(left[0].data + r * x.row_stride + step * kStep));
              ahead.fetch(step, Left::kStepBytes);
            });
            marked = seen.any();
          } else {
            multiply<Left::kParts, kRight>(left, tiles, right, count, acc,
                                           [&](int64_t step) { ahead.fetch(step, Left::kStepBytes); });
          }
          marked |= !add_tiles(acc, b.unscale + j * kPanel, Left::kUnscale, rows, s == 0,
                               out + (t - first) * ld + (j - panel) * kPanel, ld);
        }
      }
  }
  for (int64_t t = first; t < last; t += kPair)
    if (special[(t - first) / kPair])
      product(x, b, t, least(t + kPair, last), panel, panel_end, out + (t - first) * ld, ld, scratch);
}

inline void product_or_tiles(const Matrix& x, const Packed& b, int64_t first, int64_t last, int64_t panel,
                             int64_t panel_end, float* out, int64_t ld, float* scratch) {
  if (b.split == nullptr || x.col_stride != 1 || x.cols == 0)
    return product(x, b, first, last, panel, panel_end, out, ld, scratch);
  const bool narrow = x.dtype == DType::kBFloat16;
  const auto tiles = narrow ? (b.splits == 1 ? product_tiles<Narrow, 1> : product_tiles<Narrow, 3>)
                            : (b.splits == 1 ? product_tiles<Wide, 1> : product_tiles<Wide, 3>);
  const int64_t step = kMarks * kPair;
  for (int64_t t = first; t < last; t += step)
    tiles(x, b, t, least(t + step, last), panel, panel_end, out + (t - first) * ld, ld, scratch);
}

}  // namespace gsf::amx
