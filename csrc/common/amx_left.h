// A product's left factor for the matrix unit: 32 rows over some steps of k, as tiles load them.
//
// Two kinds. Narrow: bfloat16 numbers as they are, from where they lie or copied. Wide: float32 (or float16) numbers x
// as three bfloat16 parts, rounded one after the other, of which the products hi hi, hi mid, mid hi, hi lo, lo hi and
// mid mid are taken; the three others are below 2^-23 |x b| together, and rarely of one sign.
//
// Tiles take a subnormal number for zero: whoever reads x looks for one in the same pass, and the float32 product runs
// for rows that hold one. An infinity, a NaN or a number too large needs no such look, since it shows in the results.
#pragma once

#include "common/amx_tiles.h"
#include "common/split.h"

namespace gsf::amx {

constexpr int64_t kPair = 2 * kTile;  // rows that are multiplied together: two tiles

// The lines that come next, fetched while the tiles work.
struct Ahead {
  const char* from;  // null: none
  int64_t row_bytes, rows, bytes;

  void fetch(int64_t step, int64_t step_bytes) const {
    if (from == nullptr) return;
    for (int64_t at = step * step_bytes; at < least((step + 1) * step_bytes, bytes); at += 64)
      for (int64_t r = 0; r < rows; ++r) _mm_prefetch(from + r * row_bytes + at, _MM_HINT_T0);
  }
};

struct Narrow {
  static constexpr int kParts = 1;
  static constexpr int64_t kSteps = 24, kCopiedSteps = 16;  // steps between two additions to the total
  static constexpr int64_t kRow = kSteps * kStep + 32, kCopiedRow = kCopiedSteps * kStep + 32;
  static constexpr int64_t kHalves = kPair * kCopiedRow;
  static constexpr int64_t kStepBytes = 64;
  static constexpr float kUnscale = 1.0f;

  // Whether tiles can load x where it lies: whole lines of whole tiles.
  static bool in_place(const Matrix& x) {
    return x.cols % kStep == 0 && 2 * x.row_stride % 64 == 0 && reinterpret_cast<uintptr_t>(x.data) % 64 == 0;
  }

  // Copies rows on lines' bounds, a row's length spreading over the sets of L1; false where a number is subnormal.
  static bool copy(const Matrix& x, int64_t t, int64_t k, int64_t rows, int64_t n, uint16_t* to, int64_t row) {
    Subnormals16 seen;
    const auto keep = [&](__m512i bits, uint16_t* at) {
      seen.see(bits);
      _mm512_store_si512(at, bits);
    };
    const int64_t whole = n / kStep * kStep;
    const __mmask32 rest = (1u << (n - whole)) - 1;
    for (int64_t r = 0; r < rows; ++r) {
      const char* from = x.data + 2 * ((t + r) * x.row_stride + k);
      for (int64_t i = 0; i < whole; i += kStep) keep(_mm512_loadu_si512(from + 2 * i), to + r * row + i);
      if (rest != 0) keep(_mm512_maskz_loadu_epi16(rest, from + 2 * whole), to + r * row + whole);
    }
    for (int64_t r = rows; r % kTile != 0; ++r)
      for (int64_t i = 0; i < n; i += kStep) _mm512_store_si512(to + r * row + i, _mm512_setzero_si512());
    return !seen.any();
  }
};

struct Wide {
  static constexpr int kParts = 3;
  static constexpr int64_t kSteps = 6, kCopiedSteps = kSteps;
  static constexpr int64_t kRow = kSteps * kStep + 32, kCopiedRow = kRow;
  static constexpr int64_t kPart = kPair * kRow;
  static constexpr int64_t kHalves = 3 * kPart;
  static constexpr int64_t kStepBytes = 128;
  // x is multiplied by 2^32, so that the low part of the smallest normal number is still a normal number
  static constexpr float kScale = 0x1p32f, kUnscale = 0x1p-32f;

  static bool in_place(const Matrix&) { return false; }

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

  static bool copy(const Matrix& x, int64_t t, int64_t k, int64_t rows, int64_t n, uint16_t* to, int64_t row) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(1);
    const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                                  29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512 scale = _mm512_set1_ps(kScale);
    __m512i smallest = _mm512_set1_epi32(-1);
    for (int64_t r = 0; r < ceil_div(rows, kTile) * kTile; ++r)
      for (int64_t i = 0; i < n; i += kStep) {
        __m512 rest[2];
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t first = i + 16 * half, left = r < rows ? n - first : 0;
          const char* from = left > 0 ? x.at(t + r, k + first) : x.data;
          const __m512 values = load_some(from, left, x.dtype);
          const __m512i size = _mm512_and_si512(_mm512_castps_si512(values), magnitude);
          smallest = _mm512_min_epu32(smallest, _mm512_sub_epi32(size, one));
          rest[half] = _mm512_mul_ps(values, scale);
        }
        for (int64_t part = 0; part < 3; ++part) {
          const __m512 low = rounded(rest[0]), high = rounded(rest[1]);
          rest[0] = _mm512_sub_ps(rest[0], low);
          rest[1] = _mm512_sub_ps(rest[1], high);
          _mm512_store_si512(
              to + part * kPart + r * row + i,
              _mm512_permutex2var_epi16(_mm512_castps_si512(low), upper_halves, _mm512_castps_si512(high)));
        }
      }
    return _mm512_cmplt_epu32_mask(smallest, _mm512_set1_epi32(0x7fffff)) == 0;
  }
};

}  // namespace gsf::amx
