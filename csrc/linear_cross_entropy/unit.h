// What multiplies tiles: the matrix unit where GRADSHIELD_UNIT is 2, else vector instructions over the same tiles, bf16
// pairs at once where it is 1, and as floats where it is 0.
#pragma once

#include "linear_cross_entropy/vector.h"

namespace gsf::head {
namespace {

#if GRADSHIELD_UNIT == 2

// Four tiles of sums, [2 rows, 2 tokens][16, 16], held by the unit itself.
class Unit {
 public:
  static constexpr bool kNeedsTiles = true;

  GRADSHIELD_METHOD void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  GRADSHIELD_METHOD void store(float* out) const {
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    _tile_stored(2, out + 512, 64);
    _tile_stored(3, out + 768, 64);
  }

  // One step along the summed axis of 32 rows (16 where not kBoth) by 32 tokens: every pair of terms that reaches
  // float32's last bit.
  template <bool kBoth = true>
  GRADSHIELD_METHOD void step(const uint8_t* rows, int row_terms, const uint8_t* tokens, int token_terms) {
    for (int j = 0; j < row_terms; ++j) {
      _tile_stream_loadd(4, rows + j * 2 * kTileBytes, 64);
      if (kBoth) _tile_stream_loadd(5, rows + (j * 2 + 1) * kTileBytes, 64);
      const int count = token_terms < kMaxTerms - j ? token_terms : kMaxTerms - j;
      for (int i = 0; i < count; ++i) {
        _tile_loadd(6, tokens + i * 2 * kTileBytes, 64);
        _tile_loadd(7, tokens + (i * 2 + 1) * kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!kBoth) continue;
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
};

#else

// The same on vector registers: 16 rows of sums, one broadcast pair of a row at a time.
class Unit {
 public:
  static constexpr bool kNeedsTiles = false;

  GRADSHIELD_METHOD void zero() { __builtin_memset(sums_, 0, sizeof sums_); }
  GRADSHIELD_METHOD void store(float* out) const { __builtin_memcpy(out, sums_, sizeof sums_); }

  template <bool kBoth = true>
  GRADSHIELD_METHOD void step(const uint8_t* rows, int row_terms, const uint8_t* tokens, int token_terms) {
    for (int j = 0; j < row_terms; ++j) {
      const int count = token_terms < kMaxTerms - j ? token_terms : kMaxTerms - j;
      for (int half = 0; half < (kBoth ? 4 : 2); ++half)
        tile(rows + (j * 2 + half / 2) * kTileBytes, tokens + half % 2 * kTileBytes, count, sums_ + half * 256);
    }
  }

 private:
  __attribute__((noinline)) static void tile(const uint8_t* rows, const uint8_t* tokens, int count, float* sums) {
    __m512 acc[16];
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m) acc[m] = _mm512_load_ps(sums + m * 16);
    for (int i = 0; i < count; ++i) {
      for (int k = 0; k < 16; ++k) {
        const __m512i pair = _mm512_load_si512(tokens + i * 2 * kTileBytes + k * 64);
        const uint8_t* row = rows + k * 4;
#if GRADSHIELD_UNIT == 1
#pragma GCC unroll 16
        for (int m = 0; m < 16; ++m) {
          int bits;
          __builtin_memcpy(&bits, row + m * 64, 4);
          acc[m] = _mm512_dpbf16_ps(acc[m], reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits)),
                                    reinterpret_cast<__m512bh>(pair));
        }
#else
        const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        const __m512 second = chop(_mm512_castsi512_ps(pair));
#pragma GCC unroll 16
        for (int m = 0; m < 16; ++m) {
          uint32_t bits;
          __builtin_memcpy(&bits, row + m * 64, 4);
          const uint32_t low = bits << 16, high = bits & 0xffff0000u;
          float a, b;
          __builtin_memcpy(&a, &low, 4);
          __builtin_memcpy(&b, &high, 4);
          acc[m] = _mm512_fmadd_ps(_mm512_set1_ps(a), first, acc[m]);
          acc[m] = _mm512_fmadd_ps(_mm512_set1_ps(b), second, acc[m]);
        }
#endif
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m) _mm512_store_ps(sums + m * 16, acc[m]);
  }

  alignas(64) float sums_[1024];
};

#endif

// The compiler does not know that a tile load reads memory, nor how much of it the configuration is.
GRADSHIELD_INLINE void tile_loads_follow() {
  asm volatile("" ::: "memory");
}

}  // namespace
}  // namespace gsf::head
