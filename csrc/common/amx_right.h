// The matrix unit's form of a product's right factor.
//
// Maths    B = 2^-s (hi + mid + lo), each bfloat16: 24 significant bits cut into 8 + 8 + 8, nothing is rounded away. A
//          product of two bfloat16 numbers is exact in float32.
//
// Tiles treat subnormal numbers as zero and multiply an infinity by mid = 0. Hence s brings the largest magnitude of
// each column of B into [2^40, 2^41), and B is not split where a part would be subnormal or a column holds an infinity
// or a NaN: `split` says so, and the float32 product runs.
#pragma once

#include "common/amx_tiles.h"
#include "common/product.h"

namespace gsf::amx {

constexpr int64_t kTile = 16;         // rows of a tile, and pairs of k in one
constexpr int64_t kStep = 32;         // k that one tile covers
constexpr int64_t kPair = 2 * kTile;  // rows that are multiplied together
constexpr int64_t kTileHalves = 512;

inline float power_of_two(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

// Scale of each of 16 columns from the magnitudes of panel j; false where the split would not be exact.
inline bool scales(const Matrix& b, int64_t j, float* packed, float* scale, float* unscale) {
  __m512i largest = _mm512_setzero_si512(), smallest = _mm512_set1_epi32(-1);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(1);
  for (int64_t k = 0; k < b.rows; k += kDepth) {
    const int64_t n = least(kDepth, b.rows - k);
    pack_block(b, j, k, n, packed);
    for (int64_t i = 0; i < n; ++i) {
      const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(packed + i * kPanel), magnitude);
      largest = _mm512_max_epu32(largest, bits);
      smallest = _mm512_min_epu32(smallest, _mm512_sub_epi32(bits, one));  // a zero becomes the largest number
    }
  }
  alignas(64) uint32_t high[16], low[16];
  _mm512_store_si512(high, largest);
  _mm512_store_si512(low, smallest);
  for (int64_t c = 0; c < kPanel; ++c) {
    scale[c] = unscale[c] = 1.0f;
    if (high[c] == 0) continue;
    if (high[c] >= 0x7f800000u) return false;
    const int wanted = 40 - (static_cast<int>(high[c] >> 23) - 127), s = wanted > 120 ? 120 : wanted;
    scale[c] = power_of_two(s);
    unscale[c] = power_of_two(-s);
    const uint32_t least_bits = low[c] + 1;
    float least_magnitude;
    __builtin_memcpy(&least_magnitude, &least_bits, 4);
    if (!(least_magnitude * scale[c] >= 0x1p-102f)) return false;
  }
  return true;
}

// One step of k: rows [16 pairs of k][16 columns] of each part, the pair's two numbers side by side.
inline void split_step(const float* packed, int64_t n, __m512 scale, int splits, uint16_t* to) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t pair = 0; pair < kTile; ++pair) {
    __m512 rest[2];
    for (int64_t e = 0; e < 2; ++e) {
      const int64_t k = 2 * pair + e;
      rest[e] = k < n ? _mm512_mul_ps(_mm512_loadu_ps(packed + k * kPanel), scale) : _mm512_setzero_ps();
    }
    for (int part = 0; part < splits; ++part) {
      __m512i cut[2];
      for (int e = 0; e < 2; ++e) {
        cut[e] = _mm512_and_si512(_mm512_castps_si512(rest[e]), top);
        rest[e] = _mm512_sub_ps(rest[e], _mm512_castsi512_ps(cut[e]));
      }
      _mm512_storeu_si512(to + part * kTileHalves + pair * 32, _mm512_or_si512(_mm512_srli_epi32(cut[0], 16), cut[1]));
    }
  }
}

inline bool split(const Matrix& b, int64_t panel, int64_t panel_end, int splits, uint16_t* out, float* unscale) {
  alignas(64) float packed[kDepth * kPanel], scale[kPanel];
  const int64_t steps = ceil_div(b.rows, kStep);
  for (int64_t j = panel; j < panel_end; ++j) {
    if (!scales(b, j, packed, scale, unscale + j * kPanel)) return false;
    const __m512 by = _mm512_load_ps(scale);
    for (int64_t k = 0; k < b.rows; k += kDepth) {
      const int64_t n = least(kDepth, b.rows - k);
      if (b.rows > kDepth) pack_block(b, j, k, n, packed);  // else `scales` left it here
      for (int64_t i = 0; i < n; i += kStep)
        split_step(packed + i * kPanel, n - i, by, splits, out + (j * steps + (k + i) / kStep) * splits * kTileHalves);
    }
  }
  return true;
}

}  // namespace gsf::amx
