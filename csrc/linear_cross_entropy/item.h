// One item of the fused head: a group of tokens against a chunk of the vocabulary, in one pass over the words. Included
// once by each file that is compiled for one instruction set.
//
// Maths:   z[v, t] = W[v] . h[t],  P[v, t] = exp(z' - top[t]) (0 at the label),
//          acc[c, t] = sum_v P[v, t] s[v, t] W[v, c],  s = dz'/dz
//
// Tiles:   products are [16 words, 16 tokens] and [16 columns, 16 tokens]: a lane is a token everywhere, so the largest
//          logit, the sums, the rescaling and P's way into the second product need no shuffle
//
// Traffic: W is read twice per group of tokens, for either product of a window, and repacked into L2 part by part (row
//          tiles for z, transposed ones for acc); h is read once per block, acc read and written once per window; P is
//          written and read once per window and slice of columns
//
// Floats:  every float operand is a sum of bf16 terms, P of all three, or of one where it may be rounded; see `decide`
//          for what is left out when
#pragma once

#include <immintrin.h>

#include "linear_cross_entropy/head.h"
#include "linear_cross_entropy/scratch.h"
#include "linear_cross_entropy/softmax.h"
#include "linear_cross_entropy/tiles.h"
#include "linear_cross_entropy/vector.h"

namespace gsf::head {
namespace {

// Dense directions: dot[k, t] += sum_v P s[v, t] (r_k[v] . h[t]) over one step.
void direction_step(const Problem& problem, const Plan& plan, const Scratch& s, int64_t step, const uint8_t* tokens,
                    double* dot) {
  const int64_t runs = runs_of(plan);
  for (int64_t j = 0; j < problem.directions; ++j) {
    const uint8_t* rows =
        s.direction + (j * plan.steps_per_block + step) * plan.k_steps * plan.terms_r * 2 * kTileBytes;
    for (int64_t run = 0; run < runs; ++run)
      run_product<false>(plan, run, rows, plan.terms_r, tokens, s.product, [] {});
    for (int64_t half = 0; half < 2; ++half) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < kPair; ++i) {
        const int64_t at = (i / 16 * 2 + half) * 256 + i % 16 * 16;
        sum = _mm512_fmadd_ps(_mm512_load_ps(s.share_floats + at), sum_runs(s.product, runs, at), sum);
      }
      alignas(64) float sums[16];
      _mm512_store_ps(sums, sum);
      for (int64_t i = 0; i < 16; ++i) dot[j * kPair + half * 16 + i] += static_cast<double>(sums[i]);
    }
  }
}

// First product and softmax of a block for one pair of token tiles. False: a logit outgrew its reference, `above` says
// by how much, and nothing of the block counts.
template <bool kCap, bool kOneTerm, bool kRounded>
__attribute__((noinline)) bool softmax_block(const Problem& problem, const Plan& plan, const Scratch& s,
                                             const Block& block, Token& token, const uint8_t* tokens,
                                             const __mmask16* valid, bool fresh, double* dot, __m512* above) {
  const int64_t row_bytes = plan.k_steps * plan.terms_w * 2 * kTileBytes;
  const bool dense = problem.directions > 0;
  const Softmax c = {problem.scale == 0 ? 1 : problem.scale, problem.softcap, runs_of(plan),
                     dense ? s.share_floats : nullptr};
  const int64_t runs = c.runs, last_run = plan.k_steps - plan.k_steps * (runs - 1) / runs;
  const int64_t units = (kTile + last_run - 1) / last_run;
  const int64_t turns = runs == 1 ? 1 : -1;  // mask of the step in Scratch::z
  const Token before = token;
  for (int64_t run = 0; run + 1 < runs; ++run)
    for (int64_t step = 0; step < block.steps; ++step)
      run_product<kOneTerm>(plan, run, s.rows + step * row_bytes, plan.terms_w, tokens, s.z + step * runs * 1024,
                            [] {});
  for (int64_t step = 0; step <= block.steps; ++step) {
    const int64_t last = step == 0 ? 0 : step - 1;
    const float* ready = s.z + (last & turns) * runs * 1024;
    float* z = s.z + (step & turns) * runs * 1024;
    uint8_t* shares = s.shares + last * (kRounded ? 1 : kMaxTerms) * 2 * kTileBytes;
    Lanes lanes[2];
    for (int64_t half = 0; half < 2; ++half) {
      const __m512 zero = _mm512_setzero_ps();
      lanes[half] = {_mm512_load_ps(token.top + half * 16), zero, zero, zero, _mm512_set1_ps(-__builtin_inff())};
    }
    int64_t done = step == 0 ? kTile : 0;
    auto between = [&] {
      for (int64_t i = 0; i < units && done < kTile; ++i, ++done)
        two_words<kCap, kRounded>(c, ready, done, lanes, shares);
    };
    if (step < block.steps) {
      run_product<kOneTerm>(plan, runs - 1, s.rows + step * row_bytes, plan.terms_w, tokens, z, between);
      hide_words(token, block.word + step * kPair, block.word_end, hidden(c.scale), z);
      if (step == 0 && fresh) first_top<kCap>(c, z, token);
    }
    for (; done < kTile; ++done) two_words<kCap, kRounded>(c, ready, done, lanes, shares);
    if (step == 0) continue;
    for (int64_t half = 0; half < 2; ++half) above[half] = lanes[half].above;
    const __m512 most = _mm512_max_ps(above[0], above[1]);
    if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(kHeadroom), _CMP_GT_OQ) != 0) {
      const Token now = token;
      token = before;
      if (fresh) __builtin_memcpy(token.top, now.top, sizeof token.top);
      return false;
    }
    const int first = decide<kRounded>(token, 0, lanes[0], valid[0]);
    const int second = decide<kRounded>(token, 1, lanes[1], valid[1]);
    const int terms = plan.every_term ? kMaxTerms : first > second ? first : second;
    s.terms[last] = static_cast<uint8_t>(terms);
    for (int64_t half = 0; half < 2 && terms < (kRounded ? 1 : 3); ++half) enter(token, half, lanes[half], terms);
    if (dense) direction_step(problem, plan, s, last, tokens, dot);
  }
  return true;
}

using SecondProduct = void (*)(const uint8_t*, int, const uint8_t*, int, const uint8_t*, int64_t, Adder&, float*);

// Columns of p take every term of P that there is.
SecondProduct second_product_for(const Plan& plan, int64_t pair) {
  const bool of_p = pair >= plan.k_steps, half = pair + 1 == plan.column_pairs && plan.half_rank_pair;
  const bool one = (of_p ? plan.terms_p : plan.terms_w) == 1;
  if (of_p && plan.most_terms == 1) {
    if (half) return one ? second_product<true, false, 1> : second_product<false, false, 1>;
    return one ? second_product<true, true, 1> : second_product<false, true, 1>;
  }
  if (of_p && half) return one ? second_product<true, false, 3> : second_product<false, false, 3>;
  if (of_p) return one ? second_product<true, true, 3> : second_product<false, true, 3>;
  return one ? second_product<true, true, 0> : second_product<false, true, 0>;
}

// The second products of a window for one pair of token tiles and pairs [first, last) of columns.
void multiply_slice(const Plan& plan, const Scratch& s, int64_t steps, int64_t first, int64_t last, int64_t stride,
                    float* acc) {
  Adder adder(steps);
  for (int64_t i = first; i < last; ++i)
    second_product_for(plan, i)(s.columns + (i - first) * stride, i >= plan.k_steps ? plan.terms_p : plan.terms_w,
                                s.shares, plan.most_terms, s.terms, steps, adder, acc + i * 1024);
  adder.rest();
}

// A scale of 0 is told as h = 0 and a scale of 1, so that hidden words stay apart from the rest.
// [k_steps, terms_h, 2 token tiles][16 pairs of columns, 16 tokens of 32 bits]
void pack_h(const Problem& problem, const Plan& plan, int64_t pair, uint8_t* packed) {
  for (int64_t k = 0; k < plan.k_steps; ++k) {
    for (int64_t half = 0; half < 2; ++half) {
      __m512i lines[kMaxTerms][kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t t = pair * kPair + half * kTile + i;
        __m512i out[kMaxTerms];
        load_terms(problem.h, t < problem.tokens && problem.scale != 0 ? problem.index[t] : problem.h.rows, k * kPair,
                   plan.terms_h, out);
        for (int j = 0; j < plan.terms_h; ++j) lines[j][i] = out[j];
      }
      for (int j = 0; j < plan.terms_h; ++j) {
        transpose(lines[j]);
        uint8_t* tile = packed + ((k * plan.terms_h + j) * 2 + half) * kTileBytes;
        for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(tile + i * 64, lines[j][i]);
      }
    }
  }
}

int64_t scratch_bytes(const Problem& problem, const Plan& plan) {
  int64_t used = 0;
  share_out(problem, plan, nullptr, &used);
  return used;
}

void begin_thread() {
#if GRADSHIELD_UNIT == 2
  alignas(64) uint8_t config[64] = {1};
  for (int i = 0; i < 8; ++i) {
    config[16 + 2 * i] = 64;  // bytes a row
    config[48 + i] = 16;      // rows
  }
  tile_loads_follow();
  _tile_loadconfig(config);
#endif
}

void end_thread() {
#if GRADSHIELD_UNIT == 2
  _tile_release();
#endif
}

Block block_of(int64_t word, int64_t end, int64_t most_steps) {
  const int64_t steps = (end - word + kPair - 1) / kPair;
  return {word, end, steps < most_steps ? steps : most_steps};
}

using SoftmaxBlock = bool (*)(const Problem&, const Plan&, const Scratch&, const Block&, Token&, const uint8_t*,
                              const __mmask16*, bool, double*, __m512*);

template <bool kOneTerm, bool kRounded>
SoftmaxBlock softmax_block_for(const Problem& problem) {
  return problem.softcap > 0 ? softmax_block<true, kOneTerm, kRounded> : softmax_block<false, kOneTerm, kRounded>;
}

// First product and softmax of a block, at a step of its window, for one pair of token tiles.
void softmax_pair(const Problem& problem, const Plan& plan, const Scratch& s, const Block& block, int64_t step,
                  Token& token, const uint8_t* packed_h, const Partial& out, int64_t chunk, int64_t pair,
                  int64_t pair_start) {
  const bool one = plan.terms_w == 1 && plan.terms_h == 1, rounded = plan.most_terms == 1;
  const SoftmaxBlock softmax =
      one ? (rounded ? softmax_block_for<true, true>(problem) : softmax_block_for<true, false>(problem))
          : (rounded ? softmax_block_for<false, true>(problem) : softmax_block_for<false, false>(problem));
  const int64_t at = chunk * plan.pairs + pair, left = problem.tokens - pair * kPair;
  const uint32_t live = left >= kPair ? ~0u : (1u << left) - 1;
  const __mmask16 valid[2] = {static_cast<__mmask16>(live), static_cast<__mmask16>(live >> 16)};
  const uint8_t* packed = packed_h + pair * plan.k_steps * plan.terms_h * 2 * kTileBytes;
  const Scratch mine = of_pair(plan, s, pair - pair_start, step);
  const int64_t dot_size = problem.directions * kPair;
  float* acc = out.acc + at * plan.column_pairs * 1024;
  double* dot = out.dot + at * dot_size;
  __m512 above[2];
  bool fresh = block.word == chunk * plan.words_per_chunk;
  const Buffer<double> kept = allocate<double>(dot_size);
  __builtin_memcpy(kept.get(), dot, dot_size * sizeof(double));
  while (!softmax(problem, plan, mine, block, token, packed, valid, fresh, dot, above)) {
    __builtin_memcpy(dot, kept.get(), dot_size * sizeof(double));
    rescale(problem, plan, token, above, mine.shares - step * share_bytes(plan), step, acc, dot);
    __builtin_memcpy(kept.get(), dot, dot_size * sizeof(double));
    fresh = false;
  }
}

void run_item(const Problem& problem, const Plan& plan, const uint8_t* packed_h, const Partial& out, int64_t group,
              int64_t chunk, uint8_t* scratch) {
  int64_t used = 0;
  const Scratch s = share_out(problem, plan, scratch, &used);
  const int64_t start = chunk * plan.words_per_chunk;
  const int64_t end =
      start + plan.words_per_chunk < problem.weight.rows ? start + plan.words_per_chunk : problem.weight.rows;
  const int64_t pair_start = group * plan.group_pairs;
  const int64_t pair_end = pair_start + plan.group_pairs < plan.pairs ? pair_start + plan.group_pairs : plan.pairs;
  const int64_t acc_size = plan.column_pairs * 1024, dot_size = problem.directions * kPair;
  const Buffer<Token> tokens = allocate<Token>(pair_end - pair_start);
  __builtin_memset(tokens.get(), 0, sizeof(Token) * (pair_end - pair_start));
  for (int64_t pair = pair_start; pair < pair_end; ++pair) {
    Token& token = tokens[pair - pair_start];
    for (int64_t i = 0; i < kPair; ++i) {
      const int64_t t = pair * kPair + i;
      token.label[i] = t < problem.tokens ? static_cast<int32_t>(problem.labels[t]) : -1;
    }
    const int64_t at = chunk * plan.pairs + pair;
    __builtin_memset(out.acc + at * acc_size, 0, acc_size * sizeof(float));
    if (dot_size > 0) __builtin_memset(out.dot + at * dot_size, 0, dot_size * sizeof(double));
  }
  for (int64_t word = start; word < end; word += plan.steps_per_window * kPair) {
    const Block window = block_of(word, end, plan.steps_per_window);
    for (int64_t step = 0; step < window.steps; step += plan.steps_per_block) {
      const Block block = block_of(word + step * kPair, end, plan.steps_per_block);
      pack_block(problem, plan, s, block);
      tile_loads_follow();
      for (int64_t pair = pair_start; pair < pair_end; ++pair)
        softmax_pair(problem, plan, s, block, step, tokens[pair - pair_start], packed_h, out, chunk, pair, pair_start);
    }
    for (int64_t first = 0, last; first < plan.column_pairs; first = last) {
      const int64_t columns = first < plan.k_steps ? plan.k_steps : plan.column_pairs;
      last = first + slice_pairs(plan, first) < columns ? first + slice_pairs(plan, first) : columns;
      const int64_t stride = pack_slice(problem, plan, s, window, first, last);
      tile_loads_follow();
      for (int64_t pair = pair_start; pair < pair_end; ++pair)
        multiply_slice(plan, of_pair(plan, s, pair - pair_start, 0), window.steps, first, last, stride,
                       out.acc + (chunk * plan.pairs + pair) * acc_size);
    }
  }
  for (int64_t pair = pair_start; pair < pair_end; ++pair) {
    const Token& token = tokens[pair - pair_start];
    const int64_t at = (chunk * plan.pairs + pair) * kPair;
    __builtin_memcpy(out.top + at, token.top, sizeof token.top);
    __builtin_memcpy(out.sum + at, token.sum, sizeof token.sum);
  }
}

constexpr Kernel kThisKernel = {pack_h, scratch_bytes, begin_thread, end_thread, run_item};

}  // namespace
}  // namespace gsf::head
