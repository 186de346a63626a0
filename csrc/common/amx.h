// The product on bfloat16 matrix tiles, as exact as float32 multiply-adds.
//
// Maths    B = 2^-s (hi + mid + lo), each bfloat16: 24 significant bits cut into 8 + 8 + 8, nothing is rounded away.
//          A product of two bfloat16 numbers is exact in float32, so x B is summed in float32 like any other product.
// Traffic  x: one read (32 tokens x 512 k = 32 KB stay in L1); B: 2 splits bytes an element for every 32 tokens, from
// L2
//
// Tiles treat subnormal numbers as zero and multiply an infinity by mid = 0. Neither may reach a result, hence:
// - s brings the largest magnitude of each column of B into [2^40, 2^41); B is not split where a part would be
//   subnormal or a column holds an infinity or a NaN (`split` says so, and the float32 product runs);
// - 32 tokens that hold a subnormal number, or a magnitude of 2^64 or more, take the float32 product.
// What can still be flushed to zero is a product below 2^-126 in the scaled column, 2^-166 of the column's largest
// magnitude: depth 2^-166 max |B[:, c]| in a result, far below one rounding of any x that is not subnormal.
#pragma once

#include "common/product.h"

namespace gsf::amx {

constexpr int64_t kTile = 16;         // rows of a tile, and pairs of k in one
constexpr int64_t kStep = 32;         // k that one tile covers
constexpr int64_t kSteps = 16;        // steps between two additions to the total: no rounding chain is longer than 512
constexpr int64_t kPair = 2 * kTile;  // tokens that are multiplied together
constexpr int64_t kTileHalves = 512;
constexpr int64_t kRow = kSteps * kStep + 32;  // of the copy of x: not a multiple of 4 KB for any number of rows
constexpr int64_t kMarks = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tiles' configuration for the time of a call. What was configured before is configured again at the end: other
// libraries on this thread remember what they set.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    const TileConfig mine;
    _tile_loadconfig(&mine);
  }
  ~Tiles() {
    if (before_.palette != 0) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

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
inline void split_step(const float* packed, int64_t n, __m512 scale, int splits, uint16_t* to, int64_t part_size) {
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
      _mm512_storeu_si512(to + part * part_size + pair * 32, _mm512_or_si512(_mm512_srli_epi32(cut[0], 16), cut[1]));
    }
  }
}

inline bool split(const Matrix& b, int64_t panel, int64_t panel_end, int splits, uint16_t* out, float* unscale) {
  alignas(64) float packed[kDepth * kPanel], scale[kPanel];
  const int64_t steps = ceil_div(b.rows, kStep), part_size = steps * kTileHalves;
  for (int64_t j = panel; j < panel_end; ++j) {
    if (!scales(b, j, packed, scale, unscale + j * kPanel)) return false;
    const __m512 by = _mm512_load_ps(scale);
    for (int64_t k = 0; k < b.rows; k += kDepth) {
      const int64_t n = least(kDepth, b.rows - k);
      if (b.rows > kDepth) pack_block(b, j, k, n, packed);  // else `scales` left it here
      for (int64_t i = 0; i < n; i += kStep)
        split_step(packed + i * kPanel, n - i, by, splits, out + j * splits * part_size + (k + i) / kStep * kTileHalves,
                   part_size);
    }
  }
  return true;
}

// Copies `rows` rows of n bfloat16 numbers to `to` [32][kRow], zeros where there are none. False where one of them is
// subnormal, or 2^64 or more in magnitude (infinities, NaNs).
//
// The copy costs a store for each load that the test needs anyway. It gives the tiles whole rows on cache lines'
// bounds, and a row length that spreads over the sets of L1: rows of 2048 numbers would all lie in one.
inline bool copy_ordinary(const char* from, int64_t row_bytes, int64_t rows, int64_t n, uint16_t* to) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
  __m512i largest = _mm512_setzero_si512(), smallest = _mm512_set1_epi16(-1);
  for (int64_t r = 0; r < kPair; ++r)
    for (int64_t k = 0; k < n; k += kStep) {
      const __mmask32 here = r >= rows ? 0 : n - k >= kStep ? 0xffffffffu : (1u << (n - k)) - 1;
      const __m512i bits = _mm512_maskz_loadu_epi16(here, from + r * row_bytes + 2 * k);
      const __m512i size = _mm512_and_si512(bits, magnitude);
      largest = _mm512_max_epu16(largest, size);
      smallest = _mm512_min_epu16(smallest, _mm512_sub_epi16(size, one));  // a zero becomes the largest number
      _mm512_store_si512(to + r * kRow + k, bits);
    }
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16((64 + 127) << 7)) == 0 &&
         _mm512_cmplt_epu16_mask(smallest, _mm512_set1_epi16(0x7f)) == 0;
}

// The lines that the next call of copy_ordinary reads, fetched while the tiles work.
struct Ahead {
  const char* from;  // null: none
  int64_t row_bytes, rows, n;

  void fetch(int64_t step) const {
    if (from == nullptr || step * kStep >= n) return;
    for (int64_t r = 0; r < rows; ++r) _mm_prefetch(from + r * row_bytes + step * 64, _MM_HINT_T0);
  }
};

// acc[0..1] = 32 tokens times the first part of a panel, acc[2..3] = times the others, over `steps` steps of k.
inline void tiles(const uint16_t* x, const uint16_t* b, int64_t part_size, int splits, int64_t steps,
                  const Ahead& ahead, float* acc) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    ahead.fetch(s);
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
  _tile_stored(0, acc, 64);
  _tile_stored(1, acc + 256, 64);
  _tile_stored(2, acc + 512, 64);
  _tile_stored(3, acc + 768, 64);
}

// out = or += unscale (acc of the first part + acc of the others), for one panel.
inline void add_tiles(const float* acc, const float* unscale, int64_t rows, bool first, float* out, int64_t ld) {
  const __m512 by = _mm512_loadu_ps(unscale);
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 both = _mm512_add_ps(_mm512_load_ps(acc + 16 * r), _mm512_load_ps(acc + 512 + 16 * r));
    const __m512 sum = _mm512_mul_ps(both, by);
    float* to = out + r * ld;
    _mm512_storeu_ps(to, first ? sum : _mm512_add_ps(_mm512_loadu_ps(to), sum));
  }
}

inline void product_tiles(const Matrix& x, const Packed& b, int64_t first, int64_t last, int64_t panel,
                          int64_t panel_end, float* out, int64_t ld, float* scratch) {
  const int64_t depth = x.cols, steps = ceil_div(depth, kStep), row_bytes = 2 * x.row_stride;
  const int64_t stride = ceil_div(steps, ceil_div(steps, kSteps));  // blocks of equal length, at most kSteps
  float* acc = scratch;                                             // [4][16][16]
  uint16_t* copy = reinterpret_cast<uint16_t*>(scratch + 1024);     // [32][kRow]
  static_assert(1024 + kPair * kRow / 2 <= kScratchFloats, "the scratch holds both");
  bool special[kMarks] = {};
  {
    const Tiles configured;
    for (int64_t s = 0; s < steps; s += stride)
      for (int64_t t = first; t < last; t += kPair) {
        bool& marked = special[(t - first) / kPair];
        if (marked) continue;
        const int64_t k = s * kStep, n = least(depth - k, stride * kStep), rows = least(kPair, last - t);
        marked = !copy_ordinary(x.at(t, k), row_bytes, rows, n, copy);
        if (marked) continue;
        // next come the tokens after these; after the last of them the first again, deeper; at the end, other tokens
        const bool wraps = t + kPair >= last, deeper = wraps && s + stride < steps;
        const int64_t next_t = deeper ? first : t + kPair, next_k = deeper ? k + n : wraps ? 0 : k;
        Ahead ahead{nullptr, row_bytes, least(kPair, x.rows - next_t), depth - next_k};
        if (next_t < x.rows) ahead.from = x.at(next_t, next_k);
        for (int64_t j = panel; j < panel_end; ++j) {
          const uint16_t* right = b.split + (j * b.splits * steps + s) * kTileHalves;
          tiles(copy, right, steps * kTileHalves, b.splits, least(stride, steps - s), ahead, acc);
          add_tiles(acc, b.unscale + j * kPanel, rows, s == 0, out + (t - first) * ld + (j - panel) * kPanel, ld);
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
  if (b.split == nullptr || x.dtype != DType::kBFloat16 || x.col_stride != 1 || x.cols == 0)
    return product(x, b, first, last, panel, panel_end, out, ld, scratch);
  for (int64_t t = first; t < last; t += kMarks * kPair)
    product_tiles(x, b, t, least(t + kMarks * kPair, last), panel, panel_end, out + (t - first) * ld, ld, scratch);
}

}  // namespace gsf::amx
