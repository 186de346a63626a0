// The tile products of both passes, and the vector work that is done between them.
// Included by item.h alone.
#pragma once

#include "linear_cross_entropy/scratch.h"
#include "linear_cross_entropy/unit.h"

namespace gsf::head {
namespace {

// One run of the product of 32 words by 32 tokens. `between` is vector work that is done between the tile products: the
// matrix unit and the vector units then work at the same time.
template <bool kOneTerm, typename Between>
GRADSHIELD_INLINE void run_product(const Plan& plan, int64_t run, const uint8_t* rows, int row_terms,
                                   const uint8_t* tokens, float* out, Between between) {
  const int64_t runs = runs_of(plan), end = plan.k_steps * (run + 1) / runs;
  Unit unit;
  unit.zero();
  for (int64_t k = plan.k_steps * run / runs; k < end; ++k) {
    if (kOneTerm)
      unit.step(rows + k * 2 * kTileBytes, 1, tokens + k * 2 * kTileBytes, 1);
    else
      unit.step(rows + k * row_terms * 2 * kTileBytes, row_terms, tokens + k * plan.terms_h * 2 * kTileBytes,
                plan.terms_h);
    between();
  }
  unit.store(out + run * 1024);
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
    for (int64_t i = 0; i < count; i += 16) {
      _mm_prefetch(reinterpret_cast<const char*>(to_ + i + 1024), _MM_HINT_T0);  // of the next pair of columns
      _mm512_store_ps(to_ + i, _mm512_add_ps(_mm512_load_ps(to_ + i), _mm512_load_ps(from_ + i)));
    }
    to_ += count, from_ += count, left_ -= count;
  }

  alignas(64) float sums_[2][1024];
  int64_t slice_, left_ = 0, turn_ = 0;
  float* to_ = nullptr;
  const float* from_ = nullptr;
};

// The second product of one pair of column tiles over some steps: [32 columns, 32 tokens], to be added to acc.
// kTerms: of P in every step, or 0 where `terms` says it for each.
template <bool kOneTermOfW, bool kBoth, int kTerms>
__attribute__((noinline)) void second_product(const uint8_t* columns, int column_terms, const uint8_t* shares,
                                              int share_terms, const uint8_t* terms, int64_t steps, Adder& adder,
                                              float* acc) {
  Unit unit;
  unit.zero();
  for (int64_t i = 0; i < steps; ++i) {
    const int count = kTerms > 0 ? kTerms : terms[i];
    const uint8_t* share = shares + i * share_terms * 2 * kTileBytes;
    if (count > 0 && kOneTermOfW) {
      unit.step<kBoth>(columns + i * 2 * kTileBytes, 1, share, count);
    } else if (count > 0) {
      const uint8_t* column = columns + i * column_terms * 2 * kTileBytes;
      for (int j = 0; j < column_terms; ++j)
        unit.step<kBoth>(column + j * 2 * kTileBytes, 1, share, count < kMaxTerms - j ? count : kMaxTerms - j);
    }
    adder.some();
  }
  adder.rest();
  unit.store(adder.sums());
  adder.begin(acc);
}

}  // namespace
}  // namespace gsf::head
