// Sixteen float32 lanes, in the instruction set that this translation unit is compiled for.
//
// Everything here lives in a namespace of its own for each instruction set: an inline function that two translation
// units share would be kept once by the linker, possibly in the version that the processor at hand cannot run. For the
// same reason nothing from the standard library's headers is called here.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/matrix.h"

namespace gsf::GSF_ISA {

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

inline float from_float16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000u | (magnitude & 0x3ff) << 13;  // infinity or NaN
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    const float small = static_cast<float>(magnitude) * 0x1p-24f;  // a subnormal, exact in float32
    __builtin_memcpy(&bits, &small, 4);
  }
  bits |= sign;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

inline float load1(const char* p, DType dtype) {
  if (dtype == DType::kFloat32) {
    float out;
    __builtin_memcpy(&out, p, 4);
    return out;
  }
  uint16_t bits;
  __builtin_memcpy(&bits, p, 2);
  return dtype == DType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
inline Vec zero() {
  return {_mm512_setzero_ps()};
}
inline Vec set1(float x) {
  return {_mm512_set1_ps(x)};
}
inline Vec load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline void store(float* p, Vec x) {
  _mm512_storeu_ps(p, x.v);
}
inline Vec add(Vec x, Vec y) {
  return {_mm512_add_ps(x.v, y.v)};
}
inline Vec mul(Vec x, Vec y) {
  return {_mm512_mul_ps(x.v, y.v)};
}
inline Vec fma(Vec x, Vec y, Vec z) {
  return {_mm512_fmadd_ps(x.v, y.v, z.v)};
}
inline Vec load(const char* p, DType dtype) {
  if (dtype == DType::kFloat32) return {_mm512_loadu_ps(p)};
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (dtype == DType::kFloat16) return {_mm512_cvtph_ps(half)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

#elif defined(__AVX2__)

struct Vec {
  __m256 lo, hi;
};
inline Vec zero() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
inline Vec set1(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline Vec load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline Vec add(Vec x, Vec y) {
  return {_mm256_add_ps(x.lo, y.lo), _mm256_add_ps(x.hi, y.hi)};
}
inline Vec mul(Vec x, Vec y) {
  return {_mm256_mul_ps(x.lo, y.lo), _mm256_mul_ps(x.hi, y.hi)};
}
inline Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.lo, y.lo, z.lo), _mm256_fmadd_ps(x.hi, y.hi, z.hi)};
}
inline __m256 load8(const char* p, DType dtype) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (dtype == DType::kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load(const char* p, DType dtype) {
  if (dtype == DType::kFloat32) return load(reinterpret_cast<const float*>(p));
  return {load8(p, dtype), load8(p + 16, dtype)};
}

#else

// Four lanes are what SSE2 and NEON have; the compiler maps this type to either.
typedef float Lanes __attribute__((vector_size(16)));
struct Vec {
  Lanes v[4];
};
inline Vec set1(float x) {
  const Lanes lanes = {x, x, x, x};
  return {{lanes, lanes, lanes, lanes}};
}
inline Vec zero() {
  return set1(0.0f);
}
inline Vec load(const float* p) {
  Vec out;
  __builtin_memcpy(&out, p, 64);
  return out;
}
inline void store(float* p, Vec x) {
  __builtin_memcpy(p, &x, 64);
}
inline Vec add(Vec x, Vec y) {
  return {{x.v[0] + y.v[0], x.v[1] + y.v[1], x.v[2] + y.v[2], x.v[3] + y.v[3]}};
}
inline Vec mul(Vec x, Vec y) {
  return {{x.v[0] * y.v[0], x.v[1] * y.v[1], x.v[2] * y.v[2], x.v[3] * y.v[3]}};
}
inline Vec fma(Vec x, Vec y, Vec z) {
  return add(mul(x, y), z);
}
inline Vec load(const char* p, DType dtype) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = load1(p + i * size_of(dtype), dtype);
  return load(lanes);
}

#endif

// Lanes are added in a fixed tree, so that every run gives the same bits.
#if defined(__AVX512F__)
inline float sum(Vec x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float sum(Vec x) {
  float lanes[16];
  store(lanes, x);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
#endif

// n elements of a row, as float32; `stride` counts elements.
inline void convert(float* out, const char* p, int64_t n, int64_t stride, DType dtype) {
  const int64_t size = size_of(dtype);
  int64_t i = 0;
  if (stride == 1)
    for (; i + 16 <= n; i += 16) store(out + i, load(p + i * size, dtype));
  for (; i < n; ++i) out[i] = load1(p + i * stride * size, dtype);
}

}  // namespace gsf::GSF_ISA
