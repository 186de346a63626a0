// The one product that all of attention is made of, and the forms in which its factors are kept.
//
// A tile is 1 KB. As a left factor it is [16 rows][32 k]; as a right factor [16 pairs of k][16 columns][2]. Results are
// [2 row tiles][2 column tiles][16][16] floats: 4 KB.
#pragma once

#if defined(__AMX_BF16__)
#include "common/amx_tiles.h"
#endif
#include "varlen_attention/attention.h"
#include "varlen_attention/vector.h"

namespace gsf::GSF_ISA {

using attention::Tokens;

constexpr int64_t kBlock = 32;      // tokens and columns of d that are handled together
constexpr int64_t kTileSize = 512;  // bfloat16 numbers of a tile
constexpr int64_t kSums = 1024;     // floats of a result

// Tiles of a factor along a product: `step` apart along k, `other` from the first 16 rows or columns to the second.
struct Factor {
  const uint16_t* tiles;
  int64_t step, other;
};

#if defined(__AMX_BF16__)

using MatrixUnit = amx::Tiles;

// c = (c where kAdd) + x y over `steps` steps of 32
template <bool kAdd>
inline void product(Factor x, Factor y, int64_t steps, float* c) {
  if (kAdd) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + 256, 64);
    _tile_loadd(2, c + 512, 64);
    _tile_loadd(3, c + 768, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, x.tiles + s * x.step, 64);
    _tile_loadd(6, y.tiles + s * y.step, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, y.tiles + s * y.step + y.other, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x.tiles + s * x.step + x.other, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

#else

// Nothing to set up: vector registers multiply.
struct MatrixUnit {
  MatrixUnit() {}
};

// sum + both numbers of a pair of x times those of a pair of y, in all lanes
#if defined(__AVX512BF16__)
using Pairs = __m512bh;

inline Pairs pairs_of(__m512i bits) {
  return reinterpret_cast<Pairs>(bits);
}
inline __m512 add_pairs(__m512 sum, const Pairs& x, const Pairs& y) {
  return _mm512_dpbf16_ps(sum, x, y);
}
#else
struct Pairs {
  __m512 even, odd;
};

inline Pairs pairs_of(__m512i bits) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_castsi512_ps(_mm512_and_si512(bits, upper))};
}
inline __m512 add_pairs(__m512 sum, const Pairs& x, const Pairs& y) {
  return _mm512_fmadd_ps(x.odd, y.odd, _mm512_fmadd_ps(x.even, y.even, sum));
}
#endif

// Eight rows at a time, all 32 columns: what is made of a pair of x serves two products, and the sums fill half of the
// registers.
template <bool kAdd>
inline void product(Factor x, Factor y, int64_t steps, float* c) {
  for (int64_t part = 0; part < 4; ++part) {
    const uint16_t* rows = x.tiles + part / 2 * x.other + part % 2 * 256;
    float* to = c + part / 2 * 512 + part % 2 * 128;
    __m512 low[8], high[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      low[r] = kAdd ? _mm512_load_ps(to + r * 16) : _mm512_setzero_ps();
      high[r] = kAdd ? _mm512_load_ps(to + 256 + r * 16) : _mm512_setzero_ps();
    }
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t k = 0; k < 16; ++k) {
        const uint16_t *column = y.tiles + s * y.step + k * 32, *row = rows + s * x.step + 2 * k;
        const Pairs first = pairs_of(_mm512_load_si512(column)), second = pairs_of(_mm512_load_si512(column + y.other));
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
          int bits;
          __builtin_memcpy(&bits, row + r * 32, 4);
          const Pairs pair = pairs_of(_mm512_set1_epi32(bits));
          low[r] = add_pairs(low[r], pair, first);
          high[r] = add_pairs(high[r], pair, second);
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      _mm512_store_ps(to + r * 16, low[r]);
      _mm512_store_ps(to + 256 + r * 16, high[r]);
    }
  }
}

#endif

// The compiler does not know that a tile is loaded from memory.
inline void tiles_follow() {
  asm volatile("" ::: "memory");
}

// Up to 32 rows of 32 numbers somewhere in a tensor; what lies beyond is not read, and zero.
struct Window {
  const uint16_t* data;
  int64_t stride, rows, columns;

  __m512i row(int64_t i) const {
    return i < rows ? _mm512_maskz_loadu_epi16(first_of_32(columns), data + i * stride) : _mm512_setzero_si512();
  }
};

inline Window window(const Tokens& x, int64_t token, int64_t end, int64_t head, int64_t k, int64_t d) {
  return {x.at(token, head) + k, x.token_stride, end - token < kBlock ? end - token : kBlock, d - k};
}

// Left factor, rows as they are: tiles of rows 0-15 and 16-31.
inline void put_rows(const Window& x, uint16_t* first, uint16_t* second) {
  for (int64_t i = 0; i < kBlock; ++i) _mm512_store_si512((i < 16 ? first : second) + i % 16 * 32, x.row(i));
}

// Right factor with k along the columns of x: [16 pairs of columns][rows 0-15], and the same of rows 16-31.
inline void put_turned(const Window& x, uint16_t* first, uint16_t* second) {
  for (int64_t half = 0; half < 2; ++half) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) v[i] = x.row(16 * half + i);
    transpose(v);
    uint16_t* to = half == 0 ? first : second;
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, v[i]);
  }
}

// Right factor with k along the rows of x: [16 pairs of rows][columns], columns in a zip's order.
inline void put_zipped(const Window& x, uint16_t* first, uint16_t* second) {
  for (int64_t i = 0; i < 16; ++i) {
    __m512i halves[2];
    zip(x.row(2 * i), x.row(2 * i + 1), halves);
    _mm512_store_si512(first + i * 32, halves[0]);
    _mm512_store_si512(second + i * 32, halves[1]);
  }
}

// Left factor with k along the rows of x: [columns in a zip's order][rows 0-31].
inline void put_zipped_turned(const Window& x, uint16_t* first, uint16_t* second) {
  put_zipped(x, first, second);
  uint16_t* const both[2] = {first, second};
  for (uint16_t* tile : both) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) v[i] = _mm512_load_si512(tile + i * 32);
    transpose(v);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 32, v[i]);
  }
}

// Writes sums [d in a zip's order][queries in a zip's order], times a factor for each query, as rows of bfloat16.
inline void write_turned(const float* sums, Two factor, uint16_t* to, int64_t stride, int64_t rows, int64_t columns) {
  const __mmask32 keep = first_of_32(columns);
  for (int64_t half = 0; half < 2; ++half) {
    const __m512 by = half == 0 ? factor.low : factor.high;
    __m512i v[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      // pair i is columns 2 i and 2 i + 1; the first half holds four columns of every eight
      const float* from = sums + i / 2 % 2 * 512 + half * 256 + (i / 4 * 4 + i % 2 * 2) * 16;
      v[i] = pairs(_mm512_mul_ps(_mm512_load_ps(from), by), _mm512_mul_ps(_mm512_load_ps(from + 16), by));
    }
    transpose(v);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t row = zipped_column(half, i);
      if (row < rows) _mm512_mask_storeu_epi16(to + row * stride, keep, v[i]);
    }
  }
}

// Writes sums [keys][d in a zip's order], times a factor, as rows of bfloat16.
inline void write_rows(const float* sums, float factor, uint16_t* to, int64_t stride, int64_t rows, int64_t columns) {
  const __mmask32 keep = first_of_32(columns);
  const __m512 by = _mm512_set1_ps(factor);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // four columns of every eight, then the others
  for (int64_t i = 0; i < kBlock && i < rows; ++i) {
    const float* from = sums + i / 16 * 512 + i % 16 * 16;
    const __m512i row = narrow(_mm512_mul_ps(_mm512_load_ps(from), by), _mm512_mul_ps(_mm512_load_ps(from + 256), by));
    _mm512_mask_storeu_epi16(to + i * stride, keep, _mm512_permutexvar_epi64(order, row));
  }
}

}  // namespace gsf::GSF_ISA
