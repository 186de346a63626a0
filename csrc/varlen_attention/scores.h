// Which keys a query sees, and what is done to a block of scores [32 keys][32 queries].
#pragma once

#include "varlen_attention/tiles.h"

namespace gsf::GSF_ISA {

using attention::Item;
using attention::Problem;

// Blocks of 32 keys, counted from the row's start: [first, last).
struct Blocks {
  int64_t first, last;
};

// The blocks that the queries [query, end) see something of.
inline Blocks seen_by(const Problem& p, int64_t query, int64_t end) {
  return {most(0, query - p.window + 1) / kBlock, ceil_div(end, kBlock)};
}

// The blocks of queries that see something of key block `block`, below `end`.
inline Blocks seeing(const Problem& p, int64_t block, int64_t end) {
  return {block, least(end, (block * kBlock + p.window + 2 * (kBlock - 1)) / kBlock)};
}

// Whether some query of a block does not see some key of another.
inline bool partly_seen(const Problem& p, int64_t queries, int64_t keys) {
  return keys == queries || (queries - keys + 1) * kBlock - 1 >= p.window;
}

// Of 16 queries from `query` on, those that see `key`.
inline __mmask16 sees(const Problem& p, int64_t query, int64_t key) {
  const int64_t from = most(0, least(16, key - query)), to = most(0, least(16, key + p.window - query));
  return static_cast<__mmask16>(((1u << to) - 1) & ~((1u << from) - 1));
}

// exp2 of (factor s) is exp of the scaled score. With a softcap, or a factor that is not positive, scores are changed
// in place first (`bend`), and the factor is 1.
inline bool bends(const Problem& p) {
  return p.softcap > 0 || !(p.scale > 0);
}
inline float factor_of(const Problem& p) {
  return bends(p) ? 1.f : p.scale * kLog2E;
}

// Scores in units of log 2, and their derivative by the scaled score.
inline Two bend(const Problem& p, __m512 s) {
  const __m512 z = _mm512_mul_ps(s, _mm512_set1_ps(p.scale));
  if (!(p.softcap > 0)) return {_mm512_mul_ps(z, _mm512_set1_ps(kLog2E)), _mm512_set1_ps(1.f)};
  const Two bent = tanh_and_slope(_mm512_div_ps(z, _mm512_set1_ps(p.softcap)));
  return {_mm512_mul_ps(bent.low, _mm512_set1_ps(p.softcap * kLog2E)), bent.high};
}

}  // namespace gsf::GSF_ISA
