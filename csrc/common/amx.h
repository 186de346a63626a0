// The product on bfloat16 matrix tiles, as exact as float32 multiply-adds.
//
// Traffic  x: one read for each group of panels (the parts of 32 rows stay in L1); B: 2 bytes an element and part for
//          every 32 rows, from L2; out: one read and one write for every 512 (bfloat16) or 192 (float32) of k
//
// What can be flushed to zero is a product below 2^-126 of scaled factors (amx_left.h, amx_right.h): at most
// depth 2^-166 max |B[:, c]| in a result, far below one rounding for any x that is not subnormal.
#pragma once

#include "common/amx_left.h"

namespace gsf::amx {

constexpr int64_t kMarks = 64;

// out = or += unscale (acc of the first part + acc of the others), for one panel.
inline void add_tiles(const float* acc, const float* unscale, float left_unscale, int64_t rows, bool first, float* out,
                      int64_t ld) {
  const __m512 by = _mm512_loadu_ps(unscale), left_by = _mm512_set1_ps(left_unscale);
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 both = _mm512_add_ps(_mm512_load_ps(acc + 16 * r), _mm512_load_ps(acc + 512 + 16 * r));
    const __m512 sum = _mm512_mul_ps(_mm512_mul_ps(both, left_by), by);
    float* to = out + r * ld;
    _mm512_storeu_ps(to, first ? sum : _mm512_add_ps(_mm512_loadu_ps(to), sum));
  }
}

template <typename Left>
inline void product_tiles(const Matrix& x, const Packed& b, int64_t first, int64_t last, int64_t panel,
                          int64_t panel_end, float* out, int64_t ld, float* scratch) {
  const int64_t depth = x.cols, steps = ceil_div(depth, kStep), size = size_of(x.dtype),
                row_bytes = size * x.row_stride;
  const int64_t stride = ceil_div(steps, ceil_div(steps, Left::kSteps));  // blocks of equal length, at most kSteps
  float* acc = scratch;                                                   // [4][16][16]
  uint16_t* copy = reinterpret_cast<uint16_t*>(scratch + 1024);           // kHalves
  static_assert(1024 + Left::kHalves / 2 <= kScratchFloats, "the scratch holds both");
  bool special[kMarks] = {};
  {
    const Tiles configured;
    for (int64_t s = 0; s < steps; s += stride)
      for (int64_t t = first; t < last; t += kPair) {
        bool& marked = special[(t - first) / kPair];
        if (marked) continue;
        const int64_t k = s * kStep, n = least(depth - k, stride * kStep), rows = least(kPair, last - t);
        marked = !Left::copy(x, t, k, rows, n, copy);
        if (marked) continue;
        // next come the tokens after these; after the last of them the first again, deeper; at the end, other tokens
        const bool wraps = t + kPair >= last, deeper = wraps && s + stride < steps;
        const int64_t next_t = deeper ? first : t + kPair, next_k = deeper ? k + n : wraps ? 0 : k;
        Ahead ahead{nullptr, row_bytes, least(kPair, x.rows - next_t), size * (depth - next_k)};
        if (next_t < x.rows) ahead.from = x.at(next_t, next_k);
        for (int64_t j = panel; j < panel_end; ++j) {
          const uint16_t* right = b.split + (j * b.splits * steps + s) * kTileHalves;
          Left::multiply(copy, right, steps * kTileHalves, b.splits, least(stride, steps - s), ahead, acc);
          add_tiles(acc, b.unscale + j * kPanel, Left::kUnscale, rows, s == 0,
                    out + (t - first) * ld + (j - panel) * kPanel, ld);
          ahead.from = nullptr;
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
  for (int64_t t = first; t < last; t += kMarks * kPair) {
    const int64_t end = least(t + kMarks * kPair, last);
    float* to = out + (t - first) * ld;
    if (x.dtype == DType::kBFloat16) {
      product_tiles<Narrow>(x, b, t, end, panel, panel_end, to, ld, scratch);
    } else {
      product_tiles<Wide>(x, b, t, end, panel, panel_end, to, ld, scratch);
    }
  }
}

}  // namespace gsf::amx
