// AVX-512 pieces of attention: rows of bfloat16 in and out, transposes, exp2, log and tanh.
//
// `zip` makes pairs of two rows' numbers, as tiles of a right factor want them, by unpacks inside 128-bit lanes. That
// leaves columns in the order 0-3, 8-11, 16-19, 24-27 in its first half and the others in its second. Nothing is spent
// on putting them in order before the results are written.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/matrix.h"

namespace gsf::GSF_ISA {

// Subnormal numbers are zeros for the time of an item, as they are on the matrix unit: a vector of probabilities that
// underflow would else take a hundred times as long.
class NoSubnormals {
 public:
  NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~NoSubnormals() { _mm_setcsr(before_); }
  NoSubnormals(const NoSubnormals&) = delete;
  NoSubnormals& operator=(const NoSubnormals&) = delete;

 private:
  unsigned before_;
};

struct Two {
  __m512 low, high;
};

// Column of the pair that half `half` of a zip holds at position i.
inline int64_t zipped_column(int64_t half, int64_t i) {
  return i / 4 * 8 + half * 4 + i % 4;
}

inline void zip(__m512i even, __m512i odd, __m512i* halves) {
  halves[0] = _mm512_unpacklo_epi16(even, odd);
  halves[1] = _mm512_unpackhi_epi16(even, odd);
}

// What stands in the columns of a zip, for two vectors in the columns' own order.
inline Two zipped(Two x) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
  return {_mm512_permutex2var_ps(x.low, low, x.high), _mm512_permutex2var_ps(x.low, high, x.high)};
}

#if defined(__AVX512BF16__)
// 32 numbers rounded to the nearest bfloat16, ties to even; `low` first.
inline __m512i narrow(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
#else
inline __m512i round_in_place(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x),
                last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);  // a NaN's bits must not carry over into infinity
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
inline __m512i narrow(__m512 low, __m512 high) {
  const __m256i first = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_in_place(low), 16));
  const __m256i second = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_in_place(high), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}
#endif

inline __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// Two rows of 16 numbers as bfloat16 pairs, in 16 lanes of 32 bits.
inline __m512i pairs(__m512 even, __m512 odd) {
  const __m512i both = narrow(even, odd);
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
}

inline __mmask32 first_of_32(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}

// A 16 x 16 block of 32-bit values transposed in place.
inline __attribute__((always_inline)) void transpose(__m512i* x) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

// 2^x to two units in the last place; 0 for minus infinity, NaN for NaN.
inline __attribute__((always_inline)) __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);  // in this order a NaN stays
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(0x1.5bba14p-10f);
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.3cea88p-7f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.c6b752p-5f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.ebf9bcp-3f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.62e42ap-1f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, n);
}

constexpr float kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e43p-1f;

// Natural logarithm of a positive number, by the series of 2 atanh((m - 1) / (m + 1)) for the significand m in [3/4,
// 3/2).
inline __m512 log(__m512 x) {
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __m512 e = _mm512_getexp_ps(_mm512_div_ps(x, m));
  const __m512 one = _mm512_set1_ps(1.f), s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
  const __m512 square = _mm512_mul_ps(s, s);
  __m512 y = _mm512_set1_ps(2.f / 9);
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(2.f / 7));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(2.f / 5));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(2.f / 3));
  y = _mm512_fmadd_ps(_mm512_mul_ps(y, square), s, _mm512_add_ps(s, s));
  return _mm512_fmadd_ps(e, _mm512_set1_ps(kLn2), y);
}

// tanh x to an absolute error of a few 2^-24, and 1 - tanh^2 x without its cancellation; e = exp(-2 |x|).
inline Two tanh_and_slope(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f), e = exp2(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2 * kLog2E)));
  const __m512 inverse = _mm512_div_ps(one, _mm512_add_ps(one, e)), sign = _mm512_and_ps(x, _mm512_set1_ps(-0.f));
  const __m512 size = _mm512_mul_ps(_mm512_sub_ps(one, e), inverse);
  return {_mm512_or_ps(sign, size),
          _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(4.f), e), _mm512_mul_ps(inverse, inverse))};
}

}  // namespace gsf::GSF_ISA
