// From products to shares P: logits, exponentials, their sums, and P as bf16 terms; 16 tokens a vector.
// Included by item.h alone.
#pragma once

#include <initializer_list>

#include "linear_cross_entropy/head.h"
#include "linear_cross_entropy/vector.h"

namespace gsf::head {
namespace {

// A reference logit this much below a new one is replaced; until then exponentials may grow to e^20.
constexpr float kHeadroom = 20.f;

// exp of less than this is nothing beside e^0.
constexpr float kNothing = -150.f;

struct Lanes {
  __m512 top, sum_even, sum_odd, pull, above;  // pull: sum of P (z' - top); above: the largest z' - top
};

struct Token {  // what one pair of 16 tokens carries through a chunk
  alignas(64) float top[kPair], whole[kPair], pull[kPair], squares[kPair], coarse[kPair], dropped[kPair];
  alignas(64) int32_t label[kPair];
  alignas(64) double sum[kPair];
};

// What stands in z for a word that does not count: minus infinity once it is scaled.
GRADSHIELD_INLINE float hidden(float scale) {
  return scale < 0 ? __builtin_inff() : -__builtin_inff();
}

// z' - top from a product, the words that count, and the cap's slope dz'/dz.
template <bool kCap>
GRADSHIELD_INLINE __m512 logit(__m512 y, float scale, float softcap, __m512 top, __mmask16* keep, __m512* slope) {
  if (!kCap) {
    const __m512 x = _mm512_fmsub_ps(y, _mm512_set1_ps(scale), top);
    *keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kNothing), _CMP_NLT_UQ);
    return x;
  }
  const __m512 z = _mm512_mul_ps(y, _mm512_set1_ps(scale)), cap = _mm512_set1_ps(softcap);
  const __m512 x = _mm512_fmsub_ps(cap, tanh_and_slope(_mm512_div_ps(z, cap), slope), top);
  const __mmask16 counts = _mm512_cmp_ps_mask(y, _mm512_set1_ps(hidden(scale)), _CMP_NEQ_UQ);
  *keep = counts & _mm512_cmp_ps_mask(x, _mm512_set1_ps(kNothing), _CMP_NLT_UQ);
  return _mm512_mask_blend_ps(counts, _mm512_set1_ps(-__builtin_inff()), x);
}

GRADSHIELD_INLINE __m512 exp_or_nothing(__m512 x) {
  return exp_where(_mm512_cmp_ps_mask(x, _mm512_set1_ps(kNothing), _CMP_NLT_UQ), x);
}

GRADSHIELD_INLINE __m512 sum_runs(const float* z, int64_t runs, int64_t at) {
  __m512 y = _mm512_load_ps(z + at);
  for (int64_t i = 1; i < runs; ++i) y = _mm512_add_ps(y, _mm512_load_ps(z + i * 1024 + at));
  return y;
}

GRADSHIELD_INLINE __m512i zip_upper(__m512 even, __m512 odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                 _mm512_castps_si512(odd));
}

// Fractions that the words of a step add before their middle term is cut to bf16: a van der Corput sequence, so that
// the errors of equal shares cancel over 32 words instead of adding up.
alignas(64) const uint32_t kDither[kPair] = {0x0000, 0x8000, 0x4000, 0xc000, 0x2000, 0xa000, 0x6000, 0xe000,
                                             0x1000, 0x9000, 0x5000, 0xd000, 0x3000, 0xb000, 0x7000, 0xf000,
                                             0x0800, 0x8800, 0x4800, 0xc800, 0x2800, 0xa800, 0x6800, 0xe800,
                                             0x1800, 0x9800, 0x5800, 0xd800, 0x3800, 0xb800, 0x7800, 0xf800};

struct Softmax {
  float scale, softcap;
  int64_t runs;
  float* share_floats;  // null where no dense direction needs them
};

struct Terms {
  __m512 hi, mid, lo;
};

// One word of a step for 16 tokens: P, its sums, and its three bf16 terms, or P rounded, in the upper halves.
template <bool kCap, bool kRounded>
GRADSHIELD_INLINE Terms one_word(const Softmax& c, const float* z, int64_t at, int dither, Lanes& lanes, __m512& sum) {
  const __m512 y = sum_runs(z, c.runs, at);
  __mmask16 keep;
  __m512 slope;
  const __m512 x = logit<kCap>(y, c.scale, c.softcap, lanes.top, &keep, &slope);
  lanes.above = _mm512_max_ps(lanes.above, x);
  __m512 share = exp_where(keep, x);
  if (!kRounded) lanes.pull = _mm512_mask3_fmadd_ps(share, x, lanes.pull, keep);
  sum = _mm512_add_ps(sum, share);
  if (kCap) share = _mm512_maskz_mul_ps(keep, share, slope);
  if (c.share_floats != nullptr) _mm512_store_ps(c.share_floats + at, share);
  Terms terms;
  terms.hi = nearest(share);
  if (kRounded) return terms;
  const __m512 rest = _mm512_sub_ps(share, terms.hi);
  terms.mid = chop(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(dither))));
  terms.lo = _mm512_sub_ps(rest, terms.mid);
  return terms;
}

// Words 2 `row`, 2 `row` + 1 of a step for 32 tokens, zipped for the second product.
template <bool kCap, bool kRounded>
GRADSHIELD_INLINE void two_words(const Softmax& c, const float* z, int64_t row, Lanes* lanes, uint8_t* shares) {
  const int even = static_cast<int>(kDither[2 * row]), odd = static_cast<int>(kDither[2 * row + 1]);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int64_t at = ((row >> 3) * 2 + half) * 256 + (row & 7) * 32;
    const Terms first = one_word<kCap, kRounded>(c, z, at, even, lanes[half], lanes[half].sum_even);
    const Terms second = one_word<kCap, kRounded>(c, z, at + 16, odd, lanes[half], lanes[half].sum_odd);
    uint8_t* out = shares + half * kTileBytes + row * 64;
    _mm512_store_si512(out, zip_upper(first.hi, second.hi));
    if (kRounded) continue;
    _mm512_store_si512(out + 2 * kTileBytes, zip_upper(first.mid, second.mid));
    _mm512_store_si512(out + 4 * kTileBytes, zip_upper(first.lo, second.lo));
  }
}

// Nothing in the place of the tokens' labels and of words beyond the chunk.
void hide_words(const Token& token, int64_t word, int64_t word_end, float nothing, float* z) {
  const int64_t count = word_end - word;
  for (int64_t i = count; i < kPair; ++i)
    for (int64_t half = 0; half < 2; ++half)
      _mm512_store_ps(z + (i / 16 * 2 + half) * 256 + i % 16 * 16, _mm512_set1_ps(nothing));
  for (int64_t half = 0; half < 2; ++half) {
    const __m512i label = _mm512_load_si512(token.label + half * 16);
    const __m512i offset = _mm512_sub_epi32(label, _mm512_set1_epi32(static_cast<int>(word)));
    __mmask16 inside = _mm512_cmplt_epu32_mask(offset, _mm512_set1_epi32(kPair));
    if (inside == 0) continue;
    alignas(64) int32_t offsets[16];
    _mm512_store_si512(offsets, offset);
    for (; inside != 0; inside &= inside - 1) {
      const int lane = __builtin_ctz(inside), i = offsets[lane];
      z[(i / 16 * 2 + half) * 256 + i % 16 * 16 + lane] = nothing;
    }
  }
}

// The largest logit of the first step becomes the reference; 0 where the step holds nothing but the label.
template <bool kCap>
void first_top(const Softmax& c, const float* z, Token& token) {
  for (int64_t half = 0; half < 2; ++half) {
    __m512 top = _mm512_set1_ps(-__builtin_inff());
    for (int64_t i = 0; i < kPair; ++i) {
      const __m512 y = sum_runs(z, c.runs, (i / 16 * 2 + half) * 256 + i % 16 * 16);
      __mmask16 keep;
      __m512 slope;
      const __m512 x = logit<kCap>(y, c.scale, c.softcap, _mm512_setzero_ps(), &keep, &slope);
      top = _mm512_max_ps(top, x);
    }
    const __mmask16 none = _mm512_cmp_ps_mask(top, _mm512_set1_ps(-__builtin_inff()), _CMP_EQ_OQ);
    _mm512_store_ps(token.top + half * 16, _mm512_mask_blend_ps(none, top, _mm512_setzero_ps()));
  }
}

// How many terms of a step's P the second product takes, the same for all of the 32 tokens. Left out is
//
//   - the third term, while the words without it, if they were random, were off together by a standard deviation below
//     2^-22 (1 + |mean z'|) of the sum. Cut at its second term, a share P is off by a dithered error of deviation below
//     2^-17 P, so the sum of P^2 is held below 2^-10 (1 + |mean z'|)^2 of the squared sum. |z'| enters since rounding
//     z' alone, in any float32 sum, costs as much;
//   - the second, while all words without it hold less than 2^-14 of the sum: one term is off by 2^-8 at most;
//   - the first, while all words without any hold less than 2^-25 of it.
//
// Returns the number of terms, and enters the step's sums. Where P is rounded, the second and third rule go.
template <bool kRounded>
GRADSHIELD_INLINE int decide(Token& token, int64_t half, const Lanes& lanes, __mmask16 valid) {
  const int64_t at = half * 16;
  const __m512 sum = _mm512_add_ps(lanes.sum_even, lanes.sum_odd);
  const __m512 whole = _mm512_add_ps(_mm512_load_ps(token.whole + at), sum);
  const __m512 pull = _mm512_add_ps(_mm512_load_ps(token.pull + at), lanes.pull);
  _mm512_store_ps(token.whole + at, whole);
  _mm512_store_ps(token.pull + at, pull);
  for (int64_t i = 0; i < 2; ++i) {
    const __m256 part = i == 0 ? _mm512_castps512_ps256(sum) : _mm512_extractf32x8_ps(sum, 1);
    double* to = token.sum + at + 8 * i;
    _mm512_store_pd(to, _mm512_add_pd(_mm512_load_pd(to), _mm512_cvtps_pd(part)));
  }
  auto exceeds = [&](__m512 x, __m512 limit) { return (_mm512_cmp_ps_mask(x, limit, _CMP_NLE_UQ) & valid) != 0; };
  // whole (1 + |mean z'|), and sum P^2 <= max P sum P, both over 2^10 to stay far from overflow
  const __m512 reach = _mm512_fmadd_ps(_mm512_abs_ps(_mm512_fmadd_ps(lanes.top, whole, pull)), _mm512_set1_ps(0x1p-10f),
                                       _mm512_mul_ps(whole, _mm512_set1_ps(0x1p-10f)));
  const __m512 square = _mm512_fmadd_ps(_mm512_mul_ps(exp_or_nothing(lanes.above), _mm512_set1_ps(0x1p-10f)), sum,
                                        _mm512_load_ps(token.squares + at));
  if (!kRounded && exceeds(square, _mm512_mul_ps(reach, reach))) return 3;
  const __m512 coarse = _mm512_add_ps(_mm512_load_ps(token.coarse + at), sum);
  if (!kRounded && exceeds(coarse, _mm512_mul_ps(whole, _mm512_set1_ps(0x1p-14f)))) return 2;
  const __m512 dropped = _mm512_add_ps(_mm512_load_ps(token.dropped + at), sum);
  return exceeds(dropped, _mm512_mul_ps(whole, _mm512_set1_ps(0x1p-25f))) ? 1 : 0;
}

// Enter a step's words among those that went without a term.
GRADSHIELD_INLINE void enter(Token& token, int64_t half, const Lanes& lanes, int terms) {
  const int64_t at = half * 16;
  const __m512 sum = _mm512_add_ps(lanes.sum_even, lanes.sum_odd);
  const __m512 most = _mm512_mul_ps(exp_or_nothing(lanes.above), _mm512_set1_ps(0x1p-10f));
  float* counter = terms == 2 ? token.squares : terms == 1 ? token.coarse : token.dropped;
  const __m512 amount = terms == 2 ? _mm512_mul_ps(most, sum) : sum;
  _mm512_store_ps(counter + at, _mm512_add_ps(_mm512_load_ps(counter + at), amount));
}

// One step of P for 16 tokens, made relative to a new reference. A rounded P is rounded again, which counts for no more
// than one move: e^-20 is left of it at the next.
void rescale_shares(int terms, __mmask16 grown, __m512 factor, uint8_t* shares) {
  for (int64_t row = 0; row < kTile; ++row) {
    __m512i* tile[kMaxTerms];
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int j = terms - 1; j >= 0; --j) {
      tile[j] = reinterpret_cast<__m512i*>(shares + j * 2 * kTileBytes + row * 64);
      const __m512i both = _mm512_load_si512(tile[j]);
      even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
      odd = _mm512_add_ps(odd, chop(_mm512_castsi512_ps(both)));
    }
    even = _mm512_mul_ps(even, factor), odd = _mm512_mul_ps(odd, factor);
    for (int j = 0; j < terms; ++j) {
      const __m512 first = nearest(even), second = nearest(odd);
      _mm512_mask_store_epi32(tile[j], grown, zip_upper(first, second));
      even = _mm512_sub_ps(even, first), odd = _mm512_sub_ps(odd, second);
    }
  }
}

// Move the reference of the lanes that have outgrown it, and everything that is relative to it.
void rescale(const Problem& problem, const Plan& plan, Token& token, const __m512* above, uint8_t* shares,
             int64_t steps, float* acc, double* dot) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t at = half * 16;
    const __mmask16 grown = _mm512_cmp_ps_mask(above[half], _mm512_set1_ps(kHeadroom), _CMP_GT_OQ);
    const __m512 old = _mm512_load_ps(token.top + at);
    const __m512 top = _mm512_mask_add_ps(old, grown, old, above[half]);
    __m512 factor = exp_or_nothing(_mm512_sub_ps(old, top));
    factor = _mm512_mask_blend_ps(grown, _mm512_set1_ps(1.f), factor);
    _mm512_store_ps(token.top + at, top);
    // pull is relative to the reference: sum P (z' - new) = sum P (z' - old) - (new - old) sum P
    const __m512 pull =
        _mm512_fnmadd_ps(_mm512_sub_ps(top, old), _mm512_load_ps(token.whole + at), _mm512_load_ps(token.pull + at));
    _mm512_store_ps(token.pull + at, pull);
    _mm512_store_ps(token.squares + at, _mm512_mul_ps(_mm512_load_ps(token.squares + at), factor));
    for (float* x : {token.whole, token.pull, token.squares, token.coarse, token.dropped})
      _mm512_store_ps(x + at, _mm512_mul_ps(_mm512_load_ps(x + at), factor));
    for (int64_t i = 0; i < steps; ++i)
      rescale_shares(plan.most_terms, grown, factor, shares + (i * plan.most_terms * 2 + half) * kTileBytes);
    for (int64_t tile = half; tile < plan.column_pairs * 4; tile += 2)
      for (int64_t i = 0; i < 16; ++i) {
        float* x = acc + tile * 256 + i * 16;
        _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), factor));
      }
    alignas(64) float factors[16];
    _mm512_store_ps(factors, factor);
    for (int64_t i = 0; i < 16; ++i) {
      token.sum[at + i] *= static_cast<double>(factors[i]);
      for (int64_t j = 0; j < problem.directions; ++j) dot[j * kPair + at + i] *= static_cast<double>(factors[i]);
    }
  }
}

}  // namespace
}  // namespace gsf::head
