// A product's right factor as bfloat16 numbers, for instructions that multiply pairs of them.
//
// Maths    B = 2^-s (hi + mid + lo), each bfloat16: 24 significant bits cut into 8 + 8 + 8, nothing is rounded away. A
//          product of two bfloat16 numbers is exact in float32.
//
// Those treat subnormal numbers as zero and multiply an infinity by mid = 0. Hence s brings the largest magnitude of
// each column of B into [2^40, 2^41), and B is not split where a part would be subnormal or a column holds an infinity
// or a NaN: `split` says so, and the float32 product runs.
#pragma once

#include "common/product.h"

namespace gsf::GSF_ISA {

constexpr int64_t kTile = 16;         // pairs of k in a step
constexpr int64_t kStep = 2 * kTile;  // k that one step covers
constexpr int64_t kTileHalves = 512;  // numbers of one part of a panel in a step

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

inline int exponent_of(uint32_t bfloat16) {
  return static_cast<int>(bfloat16 >> 7) - 127;
}

inline uint32_t smallest_of(__m512i x) {
  const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  const __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return static_cast<uint32_t>(_mm_extract_epi16(_mm_minpos_epu16(eight), 0));
}

// A column that lies in one piece, in bfloat16: what is added to a number's bits for its scale, or false as `scales`;
// false for a subnormal number too.
inline bool scale_of_piece(const char* column, int64_t n, int16_t* shift, float* unscale) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
  __m512i largest = _mm512_setzero_si512(), smallest = _mm512_set1_epi16(-1);
  for (int64_t k = 0; k < n; k += kStep) {
    const __mmask32 here = n - k >= kStep ? ~__mmask32{0} : (__mmask32{1} << (n - k)) - 1;
    const __m512i bits = _mm512_and_si512(_mm512_maskz_loadu_epi16(here, column + 2 * k), magnitude);
    largest = _mm512_max_epu16(largest, bits);
    smallest = _mm512_min_epu16(smallest, _mm512_sub_epi16(bits, one));
  }
  const uint32_t high = 0xffff - smallest_of(_mm512_xor_si512(largest, _mm512_set1_epi16(-1)));
  *shift = 0;
  *unscale = 1.0f;
  if (high == 0) return true;
  const uint32_t low = smallest_of(smallest) + 1;
  const int s = static_cast<int>(least(40 - exponent_of(high), 120));
  if (high >= 0x7f80 || low < 0x80 || exponent_of(low) + s < -102) return false;
  *shift = static_cast<int16_t>(s * 0x80);
  *unscale = power_of_two(-s);
  return true;
}

// Panel j of a bfloat16 matrix whose columns lie in one piece each: pairs are moved, and scaled by their exponents.
inline bool split_pieces(const Matrix& b, int64_t j, uint16_t* out, float* unscale) {
  alignas(64) uint16_t step[kPanel * kStep];
  const int64_t width = least(kPanel, b.cols - j * kPanel);
  int16_t shift[kPanel] = {};
  for (int64_t c = 0; c < kPanel; ++c) {
    unscale[c] = 1.0f;
    if (c < width && !scale_of_piece(b.at(0, j * kPanel + c), b.rows, shift + c, unscale + c)) return false;
  }
  for (int64_t k = 0; k < b.rows; k += kStep) {
    const __mmask32 here = b.rows - k >= kStep ? ~__mmask32{0} : (__mmask32{1} << (b.rows - k)) - 1;
    for (int64_t c = 0; c < kPanel; ++c) {
      const char* from = c < width ? b.at(k, j * kPanel + c) : nullptr;
      const __m512i bits = _mm512_maskz_loadu_epi16(c < width ? here : 0, from);
      const __mmask32 nonzero = _mm512_test_epi16_mask(bits, _mm512_set1_epi16(0x7fff));
      _mm512_store_si512(step + c * kStep, _mm512_mask_add_epi16(bits, nonzero, bits, _mm512_set1_epi16(shift[c])));
    }
    // a pair is 32 bits, and the transposition looks at nothing else
    transpose16(reinterpret_cast<const char*>(step), kTile, DType::kFloat32,
                reinterpret_cast<float*>(out + k / kStep * kTileHalves));
  }
  return true;
}

inline bool split(const Matrix& b, int64_t panel, int64_t panel_end, int splits, uint16_t* out, float* unscale) {
  alignas(64) float packed[kDepth * kPanel], scale[kPanel];
  const int64_t steps = ceil_div(b.rows, kStep);
  for (int64_t j = panel; j < panel_end; ++j) {
    if (b.dtype == DType::kBFloat16 && b.row_stride == 1 &&
        split_pieces(b, j, out + j * steps * kTileHalves, unscale + j * kPanel))
      continue;
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

// Remembers whether a subnormal number passed by: only then is the smallest magnitude less one, without a sign, so
// small (a zero becomes the largest number).
class Subnormals16 {
 public:
  void see(__m512i bits) {
    smallest_ = _mm512_min_epu16(smallest_, _mm512_sub_epi16(_mm512_add_epi16(bits, bits), _mm512_set1_epi16(1)));
  }
  bool any() const { return _mm512_cmplt_epu16_mask(smallest_, _mm512_set1_epi16(0xff)) != 0; }

 private:
  __m512i smallest_ = _mm512_set1_epi16(-1);
};

}  // namespace gsf::GSF_ISA
