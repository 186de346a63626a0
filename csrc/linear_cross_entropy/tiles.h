// The tile products of both passes, and the vector work that is done between them.
// Included by amx_item.cpp alone.
#pragma once

#include "csrc/linear_cross_entropy/scratch.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,amx-tile,amx-bf16")

namespace gradshield::head {
namespace {

// The compiler does not know that a tile load reads memory, nor how much of it the configuration is.
GRADSHIELD_INLINE void tile_loads_follow() {
  asm volatile("" ::: "memory");
}

GRADSHIELD_INLINE void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

GRADSHIELD_INLINE void store_tiles(float* out) {
  _tile_stored(0, out, 64);
  _tile_stored(1, out + 256, 64);
  _tile_stored(2, out + 512, 64);
  _tile_stored(3, out + 768, 64);
}

// One step along the summed axis of 32 rows (16 where not kBoth) by 32 tokens: every pair of terms that reaches
// float32's last bit.
template <bool kBoth = true>
GRADSHIELD_INLINE void product_step(const uint8_t* rows, int row_terms, const uint8_t* tokens, int token_terms) {
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

// One run of the product of 32 words by 32 tokens. `between` is vector work that is done between the tile products: the
// matrix unit and the vector units then work at the same time.
template <bool kOneTerm, typename Between>
GRADSHIELD_INLINE void run_product(const Plan& plan, int64_t run, const uint8_t* rows, int row_terms,
                                   const uint8_t* tokens, float* out, Between between) {
  const int64_t runs = runs_of(plan), end = plan.k_steps * (run + 1) / runs;
  zero_tiles();
  for (int64_t k = plan.k_steps * run / runs; k < end; ++k) {
    if (kOneTerm)
      product_step(rows + k * 2 * kTileBytes, 1, tokens + k * 2 * kTileBytes, 1);
    else
      product_step(rows + k * row_terms * 2 * kTileBytes, row_terms, tokens + k * plan.terms_h * 2 * kTileBytes,
                   plan.terms_h);
    between();
  }
  store_tiles(out + run * 1024);
}

// Add products to acc between the tile products of the next pair of columns, so that both units work at once.
class Adder {
 public:
  explicit Adder(int64_t steps) : slice_((64 + steps - 1) / steps * 16) {}
  void begin(float* acc) { to_ = acc, from_ = sums_[turn_], left_ = 1024, turn_ ^= 1; }
  float* sums() { return sums_[turn_]; }
  void some() { add(left_ < slice_ ? left_ : slice_); }
  void rest() { add(left_); }

 private:
  inline __attribute__((always_inline)) void add(int64_t count) {
    for (int64_t i = 0; i < count; i += 16)
      _mm512_store_ps(to_ + i, _mm512_add_ps(_mm512_load_ps(to_ + i), _mm512_load_ps(from_ + i)));
    to_ += count, from_ += count, left_ -= count;
  }

  alignas(64) float sums_[2][1024];
  int64_t slice_, left_ = 0, turn_ = 0;
  float* to_ = nullptr;
  const float* from_ = nullptr;
};

// The second product of one pair of column tiles over a block: [32 columns, 32 tokens], to be added to acc.
template <bool kOneTermOfW, bool kBoth>
__attribute__((noinline)) void second_product(const uint8_t* columns, int column_terms, const uint8_t* shares,
                                              const uint8_t* terms, int64_t steps, bool all_terms, Adder& adder,
                                              float* acc) {
  zero_tiles();
  for (int64_t i = 0; i < steps; ++i) {
    const int count = all_terms ? kMaxTerms : terms[i];
    const uint8_t* share = shares + i * kMaxTerms * 2 * kTileBytes;
    if (count > 0 && kOneTermOfW) {
      product_step<kBoth>(columns + i * 2 * kTileBytes, 1, share, count);
    } else if (count > 0) {
      const uint8_t* column = columns + i * column_terms * 2 * kTileBytes;
      for (int j = 0; j < column_terms; ++j)
        product_step<kBoth>(column + j * 2 * kTileBytes, 1, share, count < kMaxTerms - j ? count : kMaxTerms - j);
    }
    adder.some();
  }
  adder.rest();
  store_tiles(adder.sums());
  adder.begin(acc);
}

}  // namespace
}  // namespace gradshield::head

#pragma GCC pop_options
