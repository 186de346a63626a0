// One item of the fused head on AMX: a group of tokens against a chunk of the vocabulary, in one pass over the words.
//
// Maths    z[v, t] = W[v] . h[t],  P[v, t] = exp(z' - top[t]) (0 at the label),  acc[c, t] = sum_v P[v, t] s[v, t] W[v, c]
// Tiles    products are [16 words, 16 tokens] and [16 columns, 16 tokens]: a lane is a token everywhere, so the maximum,
//          the sums, the rescaling and P's way into the second product need no shuffle
// Traffic  W is read once per group of tokens and repacked block by block into L2 (row tiles for z, transposed tiles for
//          acc); acc of 32 tokens is read and written once per block; P lives in L1/L2, z in registers and 4 KB
// Floats   every float operand is a sum of bf16 terms, P always of all three; see `decide` for what is left out when
#include <immintrin.h>

#include <initializer_list>

#include "csrc/linear_cross_entropy/head.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,amx-tile,amx-bf16")

#include "csrc/linear_cross_entropy/vector.h"

namespace gradshield::head {
namespace {

// A reference logit this much below a new one is replaced; until then exponentials may grow to e^20.
constexpr float kHeadroom = 20.f;

// exp of less than this is nothing beside e^0.
constexpr float kNothing = -150.f;

// Products along d are cut into runs of about this many tile steps, which are added up afterwards: same-signed sums keep
// their digits, and where there is more than one run, its part of h stays in L1 for all words of a block.
constexpr int64_t kRunSteps = 20;

struct Lanes {
  __m512 top, sum_even, sum_odd, pull, above;  // pull: sum of P (z' - top); above: the largest z' - top
};

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

struct Token {  // what one pair of 16 tokens carries through a chunk
  alignas(64) float top[kPair], whole[kPair], pull[kPair], squares[kPair], coarse[kPair], dropped[kPair];
  alignas(64) int32_t label[kPair];
  alignas(64) double sum[kPair];
};

int64_t runs_of(const Plan& plan) { return (plan.k_steps + kRunSteps - 1) / kRunSteps; }

int64_t column_tiles(const Plan& plan) {
  return 2 * plan.steps_per_block * (plan.k_steps * plan.terms_w + plan.rank_pairs * plan.terms_p);
}

// Start of a pair of columns in Scratch::columns.
uint8_t* columns_at(const Plan& plan, const Scratch& s, int64_t pair) {
  const int64_t before = pair < plan.k_steps
                             ? pair * plan.terms_w
                             : plan.k_steps * plan.terms_w + (pair - plan.k_steps) * plan.terms_p;
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

#define GRADSHIELD_FOUR_PRODUCTS() \
  _tile_dpbf16ps(0, 4, 6);         \
  _tile_dpbf16ps(1, 4, 7);         \
  _tile_dpbf16ps(2, 5, 6);         \
  _tile_dpbf16ps(3, 5, 7)

// The compiler does not know that a tile load reads memory, nor how much of it the configuration is.
GRADSHIELD_INLINE void tile_loads_follow() { asm volatile("" ::: "memory"); }

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

// One step along d of 32 rows by 32 tokens: every pair of terms that reaches float32's last bit.
GRADSHIELD_INLINE void product_step(const uint8_t* rows, int row_terms, const uint8_t* tokens, int token_terms) {
  for (int j = 0; j < row_terms; ++j) {
    _tile_stream_loadd(4, rows + j * 2 * kTileBytes, 64);
    _tile_stream_loadd(5, rows + (j * 2 + 1) * kTileBytes, 64);
    const int count = token_terms < kMaxTerms - j ? token_terms : kMaxTerms - j;
    for (int i = 0; i < count; ++i) {
      _tile_loadd(6, tokens + i * 2 * kTileBytes, 64);
      _tile_loadd(7, tokens + (i * 2 + 1) * kTileBytes, 64);
      GRADSHIELD_FOUR_PRODUCTS();
    }
  }
}

// What stands in z for a word that does not count: minus infinity once it is scaled.
GRADSHIELD_INLINE float hidden(float scale) { return scale < 0 ? __builtin_inff() : -__builtin_inff(); }

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

// Fractions that the words of a step add before their middle term is cut to bf16: a van der Corput sequence, so that the
// errors of equal shares cancel over 32 words instead of adding up.
alignas(64) const uint32_t kDither[kPair] = {
    0x0000, 0x8000, 0x4000, 0xc000, 0x2000, 0xa000, 0x6000, 0xe000, 0x1000, 0x9000, 0x5000,
    0xd000, 0x3000, 0xb000, 0x7000, 0xf000, 0x0800, 0x8800, 0x4800, 0xc800, 0x2800, 0xa800,
    0x6800, 0xe800, 0x1800, 0x9800, 0x5800, 0xd800, 0x3800, 0xb800, 0x7800, 0xf800};

struct Softmax {
  float scale, softcap;
  int64_t runs;
  float* share_floats;  // null where no dense direction needs them
};

struct Terms {
  __m512 hi, mid, lo;
};

// One word of a step for 16 tokens: P, its sums, and its three bf16 terms in the upper halves.
template <bool kCap>
GRADSHIELD_INLINE Terms one_word(const Softmax& c, const float* z, int64_t at, int dither, Lanes& lanes, __m512& sum) {
  const __m512 y = sum_runs(z, c.runs, at);
  __mmask16 keep;
  __m512 slope;
  const __m512 x = logit<kCap>(y, c.scale, c.softcap, lanes.top, &keep, &slope);
  lanes.above = _mm512_max_ps(lanes.above, x);
  __m512 share = exp_where(keep, x);
  lanes.pull = _mm512_mask3_fmadd_ps(share, x, lanes.pull, keep);
  sum = _mm512_add_ps(sum, share);
  if (kCap) share = _mm512_maskz_mul_ps(keep, share, slope);
  if (c.share_floats != nullptr) _mm512_store_ps(c.share_floats + at, share);
  Terms terms;
  terms.hi = nearest(share);
  const __m512 rest = _mm512_sub_ps(share, terms.hi);
  terms.mid = chop(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(dither))));
  terms.lo = _mm512_sub_ps(rest, terms.mid);
  return terms;
}

// Words 2 `row`, 2 `row` + 1 of a step for 32 tokens, zipped for the second product.
template <bool kCap>
GRADSHIELD_INLINE void two_words(const Softmax& c, const float* z, int64_t row, Lanes* lanes, uint8_t* shares) {
  const int even = static_cast<int>(kDither[2 * row]), odd = static_cast<int>(kDither[2 * row + 1]);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int64_t at = ((row >> 3) * 2 + half) * 256 + (row & 7) * 32;
    const Terms first = one_word<kCap>(c, z, at, even, lanes[half], lanes[half].sum_even);
    const Terms second = one_word<kCap>(c, z, at + 16, odd, lanes[half], lanes[half].sum_odd);
    uint8_t* out = shares + half * kTileBytes + row * 64;
    _mm512_store_si512(out, zip_upper(first.hi, second.hi));
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
//   the third term  while the words without it, if they were random, were off together by a standard deviation below
//                   2^-22 (1 + |mean z'|) of the sum: cut at bf16's second term, a share P is off by a dithered error of
//                   deviation below 2^-17 P, so the squares 2^-34 P^2 of all of them are held below 2^-44 (1 + ...)^2.
//                   |z'| enters since rounding z' alone, in any float32 sum, is worth as much
//   the second      while all words without it hold less than 2^-14 of the sum: one term is off by 2^-9 at most
//   the first       while all words without any hold less than 2^-25 of it
// Returns the number of terms and enters the step's sums.
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
  if (exceeds(square, _mm512_mul_ps(reach, reach))) return 3;
  const __m512 coarse = _mm512_add_ps(_mm512_load_ps(token.coarse + at), sum);
  if (exceeds(coarse, _mm512_mul_ps(whole, _mm512_set1_ps(0x1p-14f)))) return 2;
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
template <bool kOneTermOfW>
__attribute__((noinline)) void second_product(const uint8_t* columns, int column_terms, const uint8_t* shares,
                                      const uint8_t* terms, int64_t steps, bool all_terms, Adder& adder, float* acc) {
  zero_tiles();
  for (int64_t i = 0; i < steps; ++i) {
    const int count = all_terms ? kMaxTerms : terms[i];
    const uint8_t* share = shares + i * kMaxTerms * 2 * kTileBytes;
    if (count > 0 && kOneTermOfW) {
      product_step(columns + i * 2 * kTileBytes, 1, share, count);
    } else if (count > 0) {
      const uint8_t* column = columns + i * column_terms * 2 * kTileBytes;
      for (int j = 0; j < column_terms; ++j)
        product_step(column + j * 2 * kTileBytes, 1, share, count < kMaxTerms - j ? count : kMaxTerms - j);
    }
    adder.some();
  }
  adder.rest();
  store_tiles(adder.sums());
  adder.begin(acc);
}

// Move the reference of the lanes that have outgrown it, and everything that is relative to it.
void rescale(const Problem& problem, const Plan& plan, Token& token, const __m512* above, float* acc, double* dot) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t at = half * 16;
    const __mmask16 grown = _mm512_cmp_ps_mask(above[half], _mm512_set1_ps(kHeadroom), _CMP_GT_OQ);
    const __m512 old = _mm512_load_ps(token.top + at);
    const __m512 top = _mm512_mask_add_ps(old, grown, old, above[half]);
    __m512 factor = exp_or_nothing(_mm512_sub_ps(old, top));
    factor = _mm512_mask_blend_ps(grown, _mm512_set1_ps(1.f), factor);
    _mm512_store_ps(token.top + at, top);
    // pull is relative to the reference: sum P (z' - new) = sum P (z' - old) - (new - old) sum P
    const __m512 pull = _mm512_fnmadd_ps(_mm512_sub_ps(top, old), _mm512_load_ps(token.whole + at),
                                         _mm512_load_ps(token.pull + at));
    _mm512_store_ps(token.pull + at, pull);
    _mm512_store_ps(token.squares + at, _mm512_mul_ps(_mm512_load_ps(token.squares + at), factor));
    for (float* x : {token.whole, token.pull, token.squares, token.coarse, token.dropped})
      _mm512_store_ps(x + at, _mm512_mul_ps(_mm512_load_ps(x + at), factor));
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

struct Block {
  int64_t word, word_end, steps;  // words of the block, in 32s
};

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
template <bool kCap, bool kOneTerm>
__attribute__((noinline)) bool softmax_block(const Problem& problem, const Plan& plan, const Scratch& s, const Block& block, Token& token,
                   const uint8_t* tokens, const __mmask16* valid, bool fresh, double* dot, __m512* above) {
  const int64_t row_bytes = plan.k_steps * plan.terms_w * 2 * kTileBytes;
  const bool dense = problem.directions > 0;
  const Softmax c = {problem.scale == 0 ? 1 : problem.scale, problem.softcap, runs_of(plan), dense ? s.share_floats : nullptr};
  const int64_t runs = c.runs, last_run = plan.k_steps - plan.k_steps * (runs - 1) / runs;
  const int64_t units = (kTile + last_run - 1) / last_run;
  const int64_t turns = runs == 1 ? 1 : -1;  // mask of the step in Scratch::z
  const Token before = token;
  for (int64_t run = 0; run + 1 < runs; ++run)
    for (int64_t step = 0; step < block.steps; ++step)
      run_product<kOneTerm>(plan, run, s.rows + step * row_bytes, plan.terms_w, tokens, s.z + step * runs * 1024, [] {});
  for (int64_t step = 0; step <= block.steps; ++step) {
    const int64_t last = step == 0 ? 0 : step - 1;
    const float* ready = s.z + (last & turns) * runs * 1024;
    float* z = s.z + (step & turns) * runs * 1024;
    uint8_t* shares = s.shares + last * kMaxTerms * 2 * kTileBytes;
    Lanes lanes[2];
    for (int64_t half = 0; half < 2; ++half) {
      const __m512 zero = _mm512_setzero_ps();
      lanes[half] = {_mm512_load_ps(token.top + half * 16), zero, zero, zero, _mm512_set1_ps(-__builtin_inff())};
    }
    int64_t done = step == 0 ? kTile : 0;
    auto between = [&] {
      for (int64_t i = 0; i < units && done < kTile; ++i, ++done) two_words<kCap>(c, ready, done, lanes, shares);
    };
    if (step < block.steps) {
      run_product<kOneTerm>(plan, runs - 1, s.rows + step * row_bytes, plan.terms_w, tokens, z, between);
      hide_words(token, block.word + step * kPair, block.word_end, hidden(c.scale), z);
      if (step == 0 && fresh) first_top<kCap>(c, z, token);
    }
    for (; done < kTile; ++done) two_words<kCap>(c, ready, done, lanes, shares);
    if (step == 0) continue;
    for (int64_t half = 0; half < 2; ++half) above[half] = lanes[half].above;
    const __m512 most = _mm512_max_ps(above[0], above[1]);
    if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(kHeadroom), _CMP_GT_OQ) != 0) {
      const Token now = token;
      token = before;
      if (fresh) __builtin_memcpy(token.top, now.top, sizeof token.top);
      return false;
    }
    const int first = decide(token, 0, lanes[0], valid[0]), second = decide(token, 1, lanes[1], valid[1]);
    const int terms = plan.every_term ? kMaxTerms : first > second ? first : second;
    s.terms[last] = static_cast<uint8_t>(terms);
    for (int64_t half = 0; half < 2 && terms < 3; ++half) enter(token, half, lanes[half], terms);
    if (dense) direction_step(problem, plan, s, last, tokens, dot);
  }
  return true;
}

Scratch of_pair(const Plan& plan, const Scratch& s, int64_t pair) {
  Scratch mine = s;
  mine.shares += pair * plan.steps_per_block * kMaxTerms * 2 * kTileBytes;
  mine.terms += pair * plan.steps_per_block;
  return mine;
}

// The second products of a block for one pair of token tiles: columns of W, then of p, whose shares keep every term.
void multiply_block(const Plan& plan, const Scratch& s, const Block& block, Ahead& ahead, float* acc) {
  Adder adder(block.steps);
  for (int64_t i = 0; i < plan.column_pairs; ++i) {
    ahead.some();
    const bool of_p = i >= plan.k_steps;
    const int terms = of_p ? plan.terms_p : plan.terms_w;
    const auto product = terms == 1 ? second_product<true> : second_product<false>;
    product(columns_at(plan, s, i), terms, s.shares, s.terms, block.steps, of_p, adder, acc + i * 1024);
  }
  adder.rest();
}

}  // namespace

int64_t packed_h_bytes(const Plan& plan) { return plan.pairs * plan.k_steps * plan.terms_h * 2 * kTileBytes; }

// A scale of 0 is told as h = 0 and a scale of 1, so that hidden words stay apart from the rest.
// [k_steps, terms_h, 2 token tiles][16 pairs of columns, 16 tokens of 32 bits]
void pack_h(const Problem& problem, const Plan& plan, int64_t pair, uint8_t* packed) {
  for (int64_t k = 0; k < plan.k_steps; ++k) {
    for (int64_t half = 0; half < 2; ++half) {
      __m512i lines[kMaxTerms][kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t t = pair * kPair + half * kTile + i;
        __m512i out[kMaxTerms];
        load_terms(problem.h, t < problem.tokens && problem.scale != 0 ? problem.index[t] : problem.h.rows, k * kPair, plan.terms_h, out);
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
  alignas(64) uint8_t config[64] = {1};
  for (int i = 0; i < 8; ++i) {
    config[16 + 2 * i] = 64;  // bytes a row
    config[48 + i] = 16;      // rows
  }
  tile_loads_follow();
  _tile_loadconfig(config);
}

void end_thread() { _tile_release(); }

void run_item(const Problem& problem, const Plan& plan, const uint8_t* packed_h, const Partial& out, int64_t group,
              int64_t chunk, uint8_t* scratch) {
  int64_t used = 0;
  const Scratch s = share_out(problem, plan, scratch, &used);
  const int64_t start = chunk * plan.words_per_chunk;
  const int64_t end = start + plan.words_per_chunk < problem.weight.rows ? start + plan.words_per_chunk
                                                                         : problem.weight.rows;
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
  const bool one = plan.terms_w == 1 && plan.terms_h == 1;
  const auto softmax = problem.softcap > 0 ? (one ? softmax_block<true, true> : softmax_block<true, false>)
                                           : (one ? softmax_block<false, true> : softmax_block<false, false>);
  for (int64_t word = start; word < end; word += plan.steps_per_block * kPair) {
    Block block = {word, end, (end - word + kPair - 1) / kPair};
    if (block.steps > plan.steps_per_block) block.steps = plan.steps_per_block;
    pack_block(problem, plan, s, word, end, block.steps);
    tile_loads_follow();
    const int64_t next = word + plan.steps_per_block * kPair, next_end = next + plan.steps_per_block * kPair;
    Ahead ahead(problem.weight, next, next_end < end ? next_end : end, (pair_end - pair_start) * plan.column_pairs);
    for (int64_t pair = pair_start; pair < pair_end; ++pair) {
      Token& token = tokens[pair - pair_start];
      const int64_t at = chunk * plan.pairs + pair, left = problem.tokens - pair * kPair;
      const uint32_t live = left >= kPair ? ~0u : (1u << left) - 1;
      const __mmask16 valid[2] = {static_cast<__mmask16>(live), static_cast<__mmask16>(live >> 16)};
      const uint8_t* packed = packed_h + pair * plan.k_steps * plan.terms_h * 2 * kTileBytes;
      const Scratch mine = of_pair(plan, s, (pair - pair_start) % plan.pairs_at_once);
      float* acc = out.acc + at * acc_size;
      double* dot = out.dot + at * dot_size;
      __m512 above[2];
      bool fresh = word == start;
      const Buffer<double> kept = allocate<double>(dot_size);
      __builtin_memcpy(kept.get(), dot, dot_size * sizeof(double));
      while (!softmax(problem, plan, mine, block, token, packed, valid, fresh, dot, above)) {
        __builtin_memcpy(dot, kept.get(), dot_size * sizeof(double));
        rescale(problem, plan, token, above, acc, dot);
        __builtin_memcpy(kept.get(), dot, dot_size * sizeof(double));
        fresh = false;
      }
      tile_loads_follow();
      const int64_t done = (pair - pair_start) % plan.pairs_at_once + 1;
      if (done < plan.pairs_at_once && pair + 1 < pair_end) continue;
      for (int64_t i = 0; i < done; ++i)
        multiply_block(plan, of_pair(plan, s, i), block, ahead,
                       out.acc + (chunk * plan.pairs + pair + 1 - done + i) * acc_size);
    }
  }
  for (int64_t pair = pair_start; pair < pair_end; ++pair) {
    const Token& token = tokens[pair - pair_start];
    const int64_t at = (chunk * plan.pairs + pair) * kPair;
    __builtin_memcpy(out.top + at, token.top, sizeof token.top);
    __builtin_memcpy(out.sum + at, token.sum, sizeof token.sum);
  }
}

}  // namespace gradshield::head
