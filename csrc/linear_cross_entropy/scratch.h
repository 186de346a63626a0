// A thread's scratch memory and the packing of W, p and dense directions into it, a block of words at a time.
// Included by item.h alone.
#pragma once

#include "csrc/linear_cross_entropy/head.h"
#include "csrc/linear_cross_entropy/vector.h"

namespace gradshield::head {
namespace {

// Products along d are cut into runs of about this many tile steps, which are added up afterwards: same-signed sums
// keep their digits, and where there is more than one run, its part of h stays in L1 for all words of a block.
constexpr int64_t kRunSteps = 20;

// Shares of a thread's scratch memory.
struct Scratch {
  uint8_t* rows;        // [steps, k_steps, terms_w, 2][1 KB] W, 16 words by 32 columns
  uint8_t* p_rows;      // [rank_pairs, terms_p, 2][1 KB] p, for as long as it takes to transpose it
  uint8_t* columns;     // [column_pairs][steps, terms, 2][1 KB] W and p transposed, 16 columns by 32 words
  uint8_t* direction;   // [directions][steps, k_steps, terms_r, 2][1 KB]
  uint8_t* shares;      // [pairs at once, steps, 3 terms, 2][1 KB] P as bf16 terms, pairs of words by 16 tokens
  float* z;             // [steps][runs][2 words, 2 tokens][16, 16]; of two steps in turn where there is one run
  float* product;       // the same for a direction and one step
  float* share_floats;  // [2 words, 2 tokens][16, 16] P s as floats
  uint8_t* terms;       // [pairs at once, steps] how many terms of P each step's second product takes
};

struct Block {
  int64_t word, word_end, steps;  // words of the block, in 32s
};

int64_t runs_of(const Plan& plan) {
  return (plan.k_steps + kRunSteps - 1) / kRunSteps;
}

int64_t column_tiles(const Plan& plan) {
  return 2 * plan.steps_per_block * (plan.k_steps * plan.terms_w + plan.rank_pairs * plan.terms_p);
}

// Start of a pair of columns in Scratch::columns.
uint8_t* columns_at(const Plan& plan, const Scratch& s, int64_t pair) {
  const int64_t before =
      pair < plan.k_steps ? pair * plan.terms_w : plan.k_steps * plan.terms_w + (pair - plan.k_steps) * plan.terms_p;
  return s.columns + before * 2 * plan.steps_per_block * kTileBytes;
}

Scratch share_out(const Problem& problem, const Plan& plan, uint8_t* memory, int64_t* used) {
  uint8_t* at = memory;
  auto take = [&at](int64_t bytes) {
    uint8_t* start = at;
    at += (bytes + 63) / 64 * 64;
    return start;
  };
  const int64_t steps = plan.steps_per_block, z_bytes = runs_of(plan) * 4 * kTileBytes;
  Scratch s;
  s.rows = take(steps * plan.k_steps * plan.terms_w * 2 * kTileBytes);
  s.p_rows = take(plan.rank_pairs * plan.terms_p * 2 * kTileBytes);
  s.columns = take(column_tiles(plan) * kTileBytes);
  s.direction = take(problem.directions * steps * plan.k_steps * plan.terms_r * 2 * kTileBytes);
  s.shares = take(plan.pairs_at_once * steps * kMaxTerms * 2 * kTileBytes);
  s.z = reinterpret_cast<float*>(take(steps * z_bytes));
  s.product = reinterpret_cast<float*>(take(z_bytes));
  s.share_floats = reinterpret_cast<float*>(take(4 * kTileBytes));
  s.terms = take(plan.pairs_at_once * steps);
  *used = at - memory;
  return s;
}

// Row tiles of 32 words: a row at a time, since that is how memory is read fastest.
void pack_rows(const Matrix& x, int64_t word, int64_t word_end, int64_t k_steps, int terms, uint8_t* rows) {
  Matrix upto = x;
  upto.rows = word_end < x.rows ? word_end : x.rows;
  for (int64_t i = 0; i < kPair; ++i) {
    for (int64_t k = 0; k < k_steps; ++k) {
      __m512i out[kMaxTerms];
      load_terms(upto, word + i, k * kPair, terms, out);
      for (int j = 0; j < terms; ++j) _mm512_store_si512(rows + (k * terms + j) * 2 * kTileBytes + i * 64, out[j]);
    }
  }
}

// Calls the next block's rows of the weight into L2 while this block is multiplied, some lines at a time.
class Ahead {
 public:
  Ahead(const Matrix& x, int64_t word, int64_t word_end, int64_t calls)
      : row_bytes_(x.row_stride * (x.dtype == Dtype::kFloat32 ? 4 : 2)),
        lines_((x.cols * (x.dtype == Dtype::kFloat32 ? 4 : 2) + 63) / 64),
        row_(static_cast<const char*>(x.data) + word * row_bytes_),
        left_(x.col_stride == 1 && word_end > word ? (word_end - word) * lines_ : 0),
        each_((left_ + calls - 1) / calls) {}
  void some() {
    for (int64_t i = 0; i < each_ && left_ > 0; ++i, --left_) {
      _mm_prefetch(row_ + line_ * 64, _MM_HINT_T1);
      if (++line_ == lines_) line_ = 0, row_ += row_bytes_;
    }
  }

 private:
  int64_t row_bytes_, lines_;
  const char* row_;
  int64_t left_, each_, line_ = 0;
};

// The transposed tiles of row tiles: pairs of words are zipped to 32-bit values, whose 16 x 16 blocks are transposed.
void pack_columns(const uint8_t* rows, int64_t k_steps, int terms, uint8_t* columns, int64_t column_stride) {
  for (int64_t k = 0; k < k_steps; ++k) {
    for (int j = 0; j < terms; ++j) {
      const uint8_t* from = rows + (k * terms + j) * 2 * kTileBytes;
      uint8_t* tiles = columns + k * column_stride + j * 2 * kTileBytes;
      for (int half = 0; half < 2; ++half) {
        __m512i zipped[kTile];
        for (int i = 0; i < kTile; ++i) {
          const __m512i even = _mm512_load_si512(from + 2 * i * 64), odd = _mm512_load_si512(from + (2 * i + 1) * 64);
          zipped[i] = half == 0 ? _mm512_unpacklo_epi16(even, odd) : _mm512_unpackhi_epi16(even, odd);
        }
        transpose(zipped);
        // unpack takes 4 of every 8 columns
        for (int i = 0; i < kTile; ++i) _mm512_store_si512(tiles + (i / 4 * 8 + half * 4 + i % 4) * 64, zipped[i]);
      }
    }
  }
}

void pack_block(const Problem& problem, const Plan& plan, const Scratch& s, int64_t word, int64_t word_end,
                int64_t steps) {
  const int64_t row_bytes = plan.k_steps * 2 * kTileBytes, pair_bytes = plan.steps_per_block * 2 * kTileBytes;
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t from = word + i * kPair;
    uint8_t* rows = s.rows + i * row_bytes * plan.terms_w;
    if (plan.rank_pairs > 0) {
      uint8_t* columns = columns_at(plan, s, plan.k_steps) + i * plan.terms_p * 2 * kTileBytes;
      pack_rows(problem.p, from, word_end, plan.rank_pairs, plan.terms_p, s.p_rows);
      pack_columns(s.p_rows, plan.rank_pairs, plan.terms_p, columns, pair_bytes * plan.terms_p);
    }
    pack_rows(problem.weight, from, word_end, plan.k_steps, plan.terms_w, rows);
    pack_columns(rows, plan.k_steps, plan.terms_w, s.columns + i * plan.terms_w * 2 * kTileBytes,
                 pair_bytes * plan.terms_w);
    for (int64_t j = 0; j < problem.directions; ++j)
      pack_rows(problem.r[j], from, word_end, plan.k_steps, plan.terms_r,
                s.direction + (j * plan.steps_per_block + i) * row_bytes * plan.terms_r);
  }
}

Scratch of_pair(const Plan& plan, const Scratch& s, int64_t pair) {
  Scratch mine = s;
  mine.shares += pair * plan.steps_per_block * kMaxTerms * 2 * kTileBytes;
  mine.terms += pair * plan.steps_per_block;
  return mine;
}

}  // namespace
}  // namespace gradshield::head
