// A thread's scratch memory and the packing of W, p and dense directions into it, a block of words at a time.
// Included by item.h alone.
#pragma once

#include <algorithm>

#include "linear_cross_entropy/head.h"
#include "linear_cross_entropy/vector.h"

namespace gsf::head {
namespace {

// Products along d are cut into runs of about this many tile steps, which are added up afterwards: same-signed sums
// keep their digits, and where there is more than one run, its part of h stays in L1 for all words of a block.
constexpr int64_t kRunSteps = 20;

// How far ahead of a packing its lines are called.
constexpr int64_t kRowsAhead = 2, kColumnsAhead = 128;

// Shares of a thread's scratch memory.
struct Scratch {
  uint8_t* rows;     // [steps of a block, k_steps, terms_w, 2][1 KB] W, 16 words by 32 columns
  uint8_t* columns;  // [pairs of a slice][steps of a window, terms, 2][1 KB] W or p transposed, 16 columns by 32 words
  uint8_t* direction;   // [directions][steps of a block, k_steps, terms_r, 2][1 KB]
  uint8_t* shares;      // [pairs of a group, steps of a window, terms of P, 2][1 KB] P, pairs of words by 16 tokens
  float* z;             // [steps][runs][2 words, 2 tokens][16, 16]; of two steps in turn where there is one run
  float* product;       // the same for a direction and one step
  float* share_floats;  // [2 words, 2 tokens][16, 16] P s as floats
  uint8_t* terms;       // [pairs of a group, steps of a window] how many terms of P each step's second product takes
};

struct Block {
  int64_t word, word_end, steps;  // words of the block, in 32s
};

int64_t runs_of(const Plan& plan) {
  return (plan.k_steps + kRunSteps - 1) / kRunSteps;
}

int64_t share_bytes(const Plan& plan) {
  return plan.most_terms * 2 * kTileBytes;
}

// Pairs of columns that are packed at once from `first` on, which is one of W's or one of p's.
int64_t slice_pairs(const Plan& plan, int64_t first) {
  if (first < plan.k_steps) return plan.slice_pairs;
  const int64_t pairs = plan.slice_pairs * plan.terms_w / plan.terms_p;
  return pairs > 0 ? pairs : 1;
}

int64_t slice_bytes(const Plan& plan, int64_t first) {
  const int terms = first < plan.k_steps ? plan.terms_w : plan.terms_p;
  return slice_pairs(plan, first) * plan.steps_per_window * terms * 2 * kTileBytes;
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
  s.columns = take(std::max(slice_bytes(plan, 0), plan.rank_pairs > 0 ? slice_bytes(plan, plan.k_steps) : 0));
  s.direction = take(problem.directions * steps * plan.k_steps * plan.terms_r * 2 * kTileBytes);
  s.shares = take(plan.group_pairs * plan.steps_per_window * share_bytes(plan));
  s.z = reinterpret_cast<float*>(take((steps < 2 ? 2 : steps) * z_bytes));
  s.product = reinterpret_cast<float*>(take(z_bytes));
  s.share_floats = reinterpret_cast<float*>(take(4 * kTileBytes));
  s.terms = take(plan.group_pairs * plan.steps_per_window);
  *used = at - memory;
  return s;
}

// Calls the line of a row that holds column k, for a packing that will soon be there; the hardware does not look beyond
// a page, which a row may fill.
GRADSHIELD_INLINE void call(const Matrix& x, int64_t row, int64_t k) {
  if (row >= x.rows || k >= x.cols) return;
  const char* line = x.at(row, k);
  _mm_prefetch(line, _MM_HINT_T0);
  if (x.dtype == DType::kFloat32) _mm_prefetch(line + 64, _MM_HINT_T0);
}

// Row tiles of 32 words: a row at a time, since that is how memory is read fastest.
void pack_rows(const Matrix& x, int64_t word, int64_t word_end, int64_t k_steps, int terms, uint8_t* rows) {
  Matrix upto = x;
  upto.rows = word_end < x.rows ? word_end : x.rows;
  for (int64_t i = 0; i < kPair; ++i) {
    for (int64_t k = 0; k < k_steps; ++k) {
      __m512i out[kMaxTerms];
      call(upto, word + i + kRowsAhead, k * kPair);
      load_terms(upto, word + i, k * kPair, terms, out);
      for (int j = 0; j < terms; ++j) _mm512_store_si512(rows + (k * terms + j) * 2 * kTileBytes + i * 64, out[j]);
    }
  }
}

// Transposed tiles of 32 words by 32 columns: pairs of words are zipped to 32-bit values, whose 16 x 16 blocks are
// transposed.
void pack_column_pair(const Matrix& x, int64_t word, int64_t word_end, int64_t k, int terms, uint8_t* tiles) {
  Matrix upto = x;
  upto.rows = word_end < x.rows ? word_end : x.rows;
  __m512i lines[kMaxTerms][kPair];
  for (int64_t i = 0; i < kPair; ++i) {
    __m512i out[kMaxTerms];
    call(upto, word + i, k + kColumnsAhead);
    load_terms(upto, word + i, k, terms, out);
    for (int j = 0; j < terms; ++j) lines[j][i] = out[j];
  }
  for (int j = 0; j < terms; ++j) {
    for (int half = 0; half < 2; ++half) {
      __m512i zipped[kTile];
      for (int i = 0; i < kTile; ++i) {
        const __m512i even = lines[j][2 * i], odd = lines[j][2 * i + 1];
        zipped[i] = half == 0 ? _mm512_unpacklo_epi16(even, odd) : _mm512_unpackhi_epi16(even, odd);
      }
      transpose(zipped);
      // unpack takes 4 of every 8 columns
      for (int i = 0; i < kTile; ++i)
        _mm512_store_si512(tiles + j * 2 * kTileBytes + (i / 4 * 8 + half * 4 + i % 4) * 64, zipped[i]);
    }
  }
}

// What the first product of a block needs: rows of W and of dense directions.
void pack_block(const Problem& problem, const Plan& plan, const Scratch& s, const Block& block) {
  const int64_t row_bytes = plan.k_steps * 2 * kTileBytes;
  for (int64_t i = 0; i < block.steps; ++i) {
    const int64_t from = block.word + i * kPair;
    pack_rows(problem.weight, from, block.word_end, plan.k_steps, plan.terms_w, s.rows + i * row_bytes * plan.terms_w);
    for (int64_t j = 0; j < problem.directions; ++j)
      pack_rows(problem.r[j], from, block.word_end, plan.k_steps, plan.terms_r,
                s.direction + (j * plan.steps_per_block + i) * row_bytes * plan.terms_r);
  }
}

// What the second product of a window needs: pairs [first, last) of columns of W and then of p. Returns how far apart
// they lie.
int64_t pack_slice(const Problem& problem, const Plan& plan, const Scratch& s, const Block& window, int64_t first,
                   int64_t last) {
  const bool of_p = first >= plan.k_steps;
  const int terms = of_p ? plan.terms_p : plan.terms_w;
  const int64_t stride = window.steps * terms * 2 * kTileBytes;
  for (int64_t i = 0; i < window.steps; ++i)
    for (int64_t pair = first; pair < last; ++pair) {
      pack_column_pair(of_p ? problem.p : problem.weight, window.word + i * kPair, window.word_end,
                       (of_p ? pair - plan.k_steps : pair) * kPair, terms,
                       s.columns + (pair - first) * stride + i * terms * 2 * kTileBytes);
    }
  return stride;
}

// A pair's P from a step of the window on.
Scratch of_pair(const Plan& plan, const Scratch& s, int64_t pair, int64_t step) {
  Scratch mine = s;
  mine.shares += (pair * plan.steps_per_window + step) * share_bytes(plan);
  mine.terms += pair * plan.steps_per_window + step;
  return mine;
}

}  // namespace
}  // namespace gsf::head
