// A product's left factor for the matrix unit: 32 rows of it in L1, multiplied by one panel of the right factor.
//
// Two kinds. Narrow: bfloat16 numbers as they are. Wide: float32 (or float16) numbers x as three bfloat16 parts,
// rounded one after the other, of which the products hi hi, hi mid, mid hi, hi lo, lo hi and mid mid are taken; the
// three others are below 2^-23 |x b| together, and rarely of one sign.
//
// A row may hold no subnormal number and no magnitude as large as kLimit (so no infinity and no NaN): `copy` says so,
// and the float32 product runs for these 32 rows. Copying costs a store for each load that the test needs anyway. It
// gives the tiles whole rows on cache lines' bounds, and a row length that spreads over the sets of L1: rows of 2048
// numbers would all lie in one.
#pragma once

#include "common/amx_right.h"

namespace gsf::amx {

// The lines that the next `copy` reads, fetched while the tiles work.
struct Ahead {
  const char* from;  // null: none
  int64_t row_bytes, rows, bytes;

  void fetch(int64_t step, int64_t step_bytes) const {
    if (from == nullptr) return;
    for (int64_t at = step * step_bytes; at < least((step + 1) * step_bytes, bytes); at += 64)
      for (int64_t r = 0; r < rows; ++r) _mm_prefetch(from + r * row_bytes + at, _MM_HINT_T0);
  }
};

inline void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// acc [4][16][16]: two tiles of rows for the leading products, two for the others
inline void store_tiles(float* acc) {
  _tile_stored(0, acc, 64);
  _tile_stored(1, acc + 256, 64);
  _tile_stored(2, acc + 512, 64);
  _tile_stored(3, acc + 768, 64);
}

struct Narrow {
  static constexpr int64_t kSteps = 16;  // steps between two additions to the total: no rounding chain exceeds 512
  static constexpr int64_t kRow = kSteps * kStep + 32;
  static constexpr int64_t kHalves = kPair * kRow;
  static constexpr float kUnscale = 1.0f;
  static constexpr int kLimit = 64;  // exponent

  static bool copy(const Matrix& x, int64_t t, int64_t k, int64_t rows, int64_t n, uint16_t* to) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
    __m512i largest = _mm512_setzero_si512(), smallest = _mm512_set1_epi16(-1);
    const auto keep = [&](__m512i bits, uint16_t* at) {
      const __m512i size = _mm512_and_si512(bits, magnitude);
      largest = _mm512_max_epu16(largest, size);
      smallest = _mm512_min_epu16(smallest, _mm512_sub_epi16(size, one));  // a zero becomes the largest number
      _mm512_store_si512(at, bits);
    };
    const int64_t whole = n / kStep * kStep;
    const __mmask32 rest = (1u << (n - whole)) - 1;
    for (int64_t r = 0; r < rows; ++r) {
      const char* from = x.data + 2 * ((t + r) * x.row_stride + k);
      for (int64_t i = 0; i < whole; i += kStep) keep(_mm512_loadu_si512(from + 2 * i), to + r * kRow + i);
      if (rest != 0) keep(_mm512_maskz_loadu_epi16(rest, from + 2 * whole), to + r * kRow + whole);
    }
    for (int64_t r = rows; r < kPair; ++r)
      for (int64_t i = 0; i < n; i += kStep) _mm512_store_si512(to + r * kRow + i, _mm512_setzero_si512());
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16((kLimit + 127) << 7)) == 0 &&
           _mm512_cmplt_epu16_mask(smallest, _mm512_set1_epi16(0x7f)) == 0;
  }

  // acc = 32 rows times one panel, over `steps` steps of k
  static void multiply(const uint16_t* x, const uint16_t* b, int64_t part_size, int splits, int64_t steps,
                       const Ahead& ahead, float* acc) {
    clear_tiles();
    for (int64_t s = 0; s < steps; ++s) {
      ahead.fetch(s, 64);
      const uint16_t *left = x + s * kStep, *right = b + s * kTileHalves;
      _tile_loadd(4, left, 2 * kRow);
      _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, left + kTile * kRow, 2 * kRow);
      _tile_dpbf16ps(1, 5, 6);
      if (splits == 3) {
        _tile_loadd(7, right + part_size, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(6, right + 2 * part_size, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
    store_tiles(acc);
  }
};

struct Wide {
  static constexpr int64_t kSteps = 6;
  static constexpr int64_t kRow = kSteps * kStep + 32;
  static constexpr int64_t kPart = kPair * kRow;
  static constexpr int64_t kHalves = 3 * kPart;
  // x is multiplied by 2^32, so that the low part of the smallest normal number is still a normal number
  static constexpr float kScale = 0x1p32f, kUnscale = 0x1p-32f;
  static constexpr int kLimit = 32;

  // The nearest bfloat16 number, ties away from zero, as the upper half of a float32 number.
  static __m512 rounded(__m512 x) {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  static __m512 load_some(const char* p, int64_t n, DType dtype) {
    const __mmask16 here = n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
    if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(here, p);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, p));
  }

  static bool copy(const Matrix& x, int64_t t, int64_t k, int64_t rows, int64_t n, uint16_t* to) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(1);
    const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                                  29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512 scale = _mm512_set1_ps(kScale);
    __m512i largest = _mm512_setzero_si512(), smallest = _mm512_set1_epi32(-1);
    for (int64_t r = 0; r < kPair; ++r)
      for (int64_t i = 0; i < n; i += kStep) {
        __m512 rest[2];
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t first = i + 16 * half, left = r < rows ? n - first : 0;
          const char* from = left > 0 ? x.at(t + r, k + first) : x.data;
          const __m512 values = load_some(from, left, x.dtype);
          const __m512i size = _mm512_and_si512(_mm512_castps_si512(values), magnitude);
          largest = _mm512_max_epu32(largest, size);
          smallest = _mm512_min_epu32(smallest, _mm512_sub_epi32(size, one));
          rest[half] = _mm512_mul_ps(values, scale);
        }
        for (int64_t part = 0; part < 3; ++part) {
          const __m512 low = rounded(rest[0]), high = rounded(rest[1]);
          rest[0] = _mm512_sub_ps(rest[0], low);
          rest[1] = _mm512_sub_ps(rest[1], high);
          _mm512_store_si512(
              to + part * kPart + r * kRow + i,
              _mm512_permutex2var_epi16(_mm512_castps_si512(low), upper_halves, _mm512_castps_si512(high)));
        }
      }
    return _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32((kLimit + 127) << 23)) == 0 &&
           _mm512_cmplt_epu32_mask(smallest, _mm512_set1_epi32(0x7fffff)) == 0;
  }

  static void multiply(const uint16_t* x, const uint16_t* b, int64_t part_size, int splits, int64_t steps,
                       const Ahead& ahead, float* acc) {
    clear_tiles();
    for (int64_t s = 0; s < steps; ++s) {
      ahead.fetch(s, 128);
      const uint16_t *left = x + s * kStep, *right = b + s * kTileHalves;
      _tile_loadd(4, left, 2 * kRow);
      _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, left + kTile * kRow, 2 * kRow);
      _tile_dpbf16ps(1, 5, 6);
      if (splits == 3) {
        _tile_loadd(7, right + part_size, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(7, right + 2 * part_size, 64);
        _tile_dpbf16ps(0, 4, 7);  // here, so that neither pair of tiles waits for five products in a row
        _tile_dpbf16ps(1, 5, 7);
      }
      _tile_loadd(4, left + kPart, 2 * kRow);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, left + kPart + kTile * kRow, 2 * kRow);
      _tile_dpbf16ps(3, 5, 6);
      if (splits == 3) {
        _tile_loadd(7, right + part_size, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_loadd(4, left + 2 * kPart, 2 * kRow);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, left + 2 * kPart + kTile * kRow, 2 * kRow);
      _tile_dpbf16ps(3, 5, 6);
    }
    store_tiles(acc);
  }
};

}  // namespace gsf::amx
