// AVX-512 pieces of the head: loads of any dtype, exact bf16 terms, transposes, exp and tanh.
#pragma once

#include <immintrin.h>

#include "linear_cross_entropy/head.h"

namespace gsf::head {

#define GRADSHIELD_INLINE static inline __attribute__((always_inline))
#define GRADSHIELD_METHOD inline __attribute__((always_inline))

// Two vectors of 16 floats, or 32 bf16 side by side.
struct Two {
  __m512 low, high;
};

GRADSHIELD_INLINE __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// 32 values of a row from column k on as floats; zero beyond the matrix, whose memory is not touched there.
GRADSHIELD_INLINE Two load_row(const Matrix& x, int64_t row, int64_t k) {
  const int64_t left = row < x.rows ? x.cols - k : 0;
  if (left <= 0) return {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const __mmask32 mask = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
  const char* from = x.at(row, k);
  if (x.col_stride != 1) {
    alignas(64) uint8_t gathered[128] = {};
    const int64_t size = size_of(x.dtype), count = left < 32 ? left : 32;
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(gathered + i * size, from + i * x.col_stride * size, size);
    if (x.dtype == DType::kFloat32) return {_mm512_load_ps(gathered), _mm512_load_ps(gathered + 64)};
    const __m512i bits = _mm512_load_si512(gathered);
    const __m256i low = _mm512_castsi512_si256(bits), high = _mm512_extracti64x4_epi64(bits, 1);
    if (x.dtype == DType::kFloat16) return {_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)};
    return {widen(low), widen(high)};
  }
  if (x.dtype == DType::kFloat32) {
    return {_mm512_maskz_loadu_ps(mask & 0xffff, from), _mm512_maskz_loadu_ps(mask >> 16, from + 64)};
  }
  const __m512i bits = _mm512_maskz_loadu_epi16(mask, from);
  const __m256i low = _mm512_castsi512_si256(bits), high = _mm512_extracti64x4_epi64(bits, 1);
  if (x.dtype == DType::kFloat16) return {_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)};
  return {widen(low), widen(high)};
}

GRADSHIELD_INLINE __m512i upper_halves(__m512 low, __m512 high) {
  const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
  const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

GRADSHIELD_INLINE __m512 chop(__m512 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(int(0xffff0000u))));
}

// Round to the nearest bf16, ties away from zero; what is lost goes to the next term, so ties do not matter.
GRADSHIELD_INLINE __m512 nearest(__m512 x) {
  return chop(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000))));
}

// 32 values of a row as `terms` rows of 32 bf16 whose sum is exactly the value.
GRADSHIELD_INLINE void load_terms(const Matrix& x, int64_t row, int64_t k, int terms, __m512i* out) {
  Two rest;
  if (x.dtype == DType::kBFloat16 && x.col_stride == 1) {
    const int64_t left = row < x.rows ? x.cols - k : 0;
    const __mmask32 mask = left >= 32 ? ~__mmask32(0) : left <= 0 ? 0 : (__mmask32(1) << left) - 1;
    out[0] = mask == 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, x.at(row, k));
    return;
  }
  rest = load_row(x, row, k);
  for (int i = 0; i < terms; ++i) {
    const Two term = {nearest(rest.low), nearest(rest.high)};
    out[i] = upper_halves(term.low, term.high);
    rest = {_mm512_sub_ps(rest.low, term.low), _mm512_sub_ps(rest.high, term.high)};
  }
}

// Transpose a 16 x 16 block of 32-bit values in place.
GRADSHIELD_INLINE void transpose(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

// expm1 of the part of x beyond n ln 2, |x - n ln 2| <= ln 2 / 2; relative error of 1 + result below 2^-28 in exact
// arithmetic. The two parts of ln 2 keep x - n ln 2 exact to the last bit for |n| < 2^9.
GRADSHIELD_INLINE __m512 reduced_expm1(__m512 x, __m512* n) {
  *n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 rest = _mm512_fnmadd_ps(*n, _mm512_set1_ps(0x1.62e4p-1f), x);
  rest = _mm512_fnmadd_ps(*n, _mm512_set1_ps(0x1.7f7d1cp-20f), rest);
  __m512 q = _mm512_set1_ps(0x1.6a2256p-10f);
  q = _mm512_fmadd_ps(q, rest, _mm512_set1_ps(0x1.123b04p-7f));
  q = _mm512_fmadd_ps(q, rest, _mm512_set1_ps(0x1.5558f8p-5f));
  q = _mm512_fmadd_ps(q, rest, _mm512_set1_ps(0x1.55549p-3f));
  q = _mm512_fmadd_ps(q, rest, _mm512_set1_ps(0x1.fffffcp-2f));
  return _mm512_fmadd_ps(_mm512_mul_ps(rest, rest), q, rest);
}

// exp x where `keep` is set, else 0; x below -1e5 must not be kept. NaN stays NaN.
GRADSHIELD_INLINE __m512 exp_where(__mmask16 keep, __m512 x) {
  __m512 n;
  const __m512 q = reduced_expm1(x, &n);
  return _mm512_maskz_scalef_ps(keep, _mm512_add_ps(q, _mm512_set1_ps(1.f)), n);
}

// tanh x, and 1 - tanh^2 x without its cancellation: with e = expm1(-2|x|), tanh|x| = -e / (2 + e), and
// 1 - tanh^2 = 4 (1 + e) / (2 + e)^2.
GRADSHIELD_INLINE __m512 tanh_and_slope(__m512 x, __m512* slope) {
  const __m512 one = _mm512_set1_ps(1.f), size = _mm512_abs_ps(x);
  __m512 n;
  const __m512 twice = _mm512_max_ps(_mm512_set1_ps(-200.f), _mm512_mul_ps(size, _mm512_set1_ps(-2.f)));
  const __m512 q = reduced_expm1(twice, &n), power = _mm512_scalef_ps(one, n);
  const __m512 e = _mm512_fmadd_ps(power, q, _mm512_sub_ps(power, one));
  const __m512 below = _mm512_add_ps(_mm512_set1_ps(2.f), e);
  const __m512 whole = _mm512_mul_ps(power, _mm512_add_ps(one, q));
  const __m512 inverse = _mm512_div_ps(one, below);
  *slope = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(4.f), whole), _mm512_mul_ps(inverse, inverse));
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.f));
  return _mm512_or_ps(sign, _mm512_div_ps(_mm512_sub_ps(_mm512_setzero_ps(), e), below));
}

}  // namespace gsf::head
