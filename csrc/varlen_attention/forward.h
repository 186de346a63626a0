// Attention's forward pass for one item.
//
// Maths    S^T = K Q^T,  P^T = exp(S^T - top),  O^T = V^T P^T / sum P        keys down the rows, queries along them
//          The softmax's maxima and sums then run down columns: plain vector sums, none across lanes. Up to 256 keys
//          are taken at once; where a row is longer, O^T and the sums are rescaled as `top` grows.
// Traffic  q, out: one read, one write; k, v: one read for the group's heads, packed 2 x 2 B an element into L2;
//          S: 32 KB and P: 16 KB in L1
#pragma once

#include "varlen_attention/scores.h"

namespace gsf::GSF_ISA {

// Blocks of keys between two rescalings; more than 2, or a window could hide a whole chunk.
constexpr int64_t kChunk = 8;

struct ForwardScratch {
  uint16_t *keys, *values;     // [blocks][2][steps] rows of K; [steps][2][blocks] V^T
  uint16_t *queries, *shares;  // [2][steps] Q^T; [2][kChunk] P^T
  float *scores, *sums;        // [kChunk] results; [steps] results
  int64_t bytes;
};

inline ForwardScratch share_forward(const Problem& p, const Item& item, uint8_t* memory) {
  const Blocks keys = seen_by(p, item.first, item.last);
  const int64_t steps = ceil_div(p.d, kBlock), blocks = keys.last - keys.first;
  uint16_t* at = reinterpret_cast<uint16_t*>(memory);
  const auto take = [&at](int64_t tiles) {
    uint16_t* start = at;
    at += tiles * kTileSize;
    return start;
  };
  ForwardScratch s;
  s.keys = take(2 * blocks * steps);
  s.values = take(2 * blocks * steps);
  s.queries = take(2 * steps);
  s.shares = take(2 * kChunk);
  s.scores = reinterpret_cast<float*>(take(4 * kChunk));
  s.sums = reinterpret_cast<float*>(take(4 * steps));
  s.bytes = (at - reinterpret_cast<uint16_t*>(memory)) * 2;
  return s;
}

inline int64_t forward_bytes(const Problem& p, const Item& item) {
  return share_forward(p, item, nullptr).bytes;
}

// Scores in place: bent where that is asked for, minus infinity where a query does not see a key.
inline void prepare(const Problem& p, int64_t queries, int64_t keys, float* scores) {
  const bool bent = bends(p), masked = partly_seen(p, queries, keys);
  if (!bent && !masked) return;
  const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
  for (int64_t k = 0; k < kBlock; ++k)
    for (int64_t half = 0; half < 2; ++half) {
      float* at = scores + (k / 16 * 2 + half) * 256 + k % 16 * 16;
      __m512 s = _mm512_load_ps(at);
      if (bent) s = bend(p, s).low;
      const __mmask16 keep = masked ? sees(p, queries * kBlock + 16 * half, keys * kBlock + k) : 0xffff;
      _mm512_store_ps(at, _mm512_mask_blend_ps(keep, nothing, s));
    }
}

inline Two largest(const float* scores, int64_t blocks, Two top) {
  __m512 low[2] = {top.low, top.low}, high[2] = {top.high, top.high};
  for (const float* at = scores; at < scores + blocks * kSums; at += 512)
    for (int64_t i = 0; i < 16; i += 2)
      for (int64_t j = 0; j < 2; ++j) {
        low[j] = _mm512_max_ps(low[j], _mm512_load_ps(at + (i + j) * 16));
        high[j] = _mm512_max_ps(high[j], _mm512_load_ps(at + 256 + (i + j) * 16));
      }
  return {_mm512_max_ps(low[0], low[1]), _mm512_max_ps(high[0], high[1])};
}

// P^T of a block as a right factor; its sums are added to `sum`. `shift` is factor * top.
inline void exponentials(const float* scores, __m512 factor, Two shift, Two& sum, uint16_t* first, uint16_t* second) {
  for (int64_t pair = 0; pair < 16; ++pair) {
    const float* at = scores + pair / 8 * 512 + pair % 8 * 32;
    __m512i rows[2];
    for (int64_t j = 0; j < 2; ++j) {
      const __m512 low = exp2(_mm512_fmsub_ps(_mm512_load_ps(at + j * 16), factor, shift.low));
      const __m512 high = exp2(_mm512_fmsub_ps(_mm512_load_ps(at + 256 + j * 16), factor, shift.high));
      sum.low = _mm512_add_ps(sum.low, low);
      sum.high = _mm512_add_ps(sum.high, high);
      rows[j] = narrow(low, high);
    }
    __m512i halves[2];
    zip(rows[0], rows[1], halves);
    _mm512_store_si512(first + pair * 32, halves[0]);
    _mm512_store_si512(second + pair * 32, halves[1]);
  }
}

inline void rescale(float* sums, int64_t results, Two by) {
  by = zipped(by);
  for (float* at = sums; at < sums + results * kSums; at += 512)
    for (int64_t i = 0; i < 16; ++i) {
      _mm512_store_ps(at + i * 16, _mm512_mul_ps(_mm512_load_ps(at + i * 16), by.low));
      _mm512_store_ps(at + 256 + i * 16, _mm512_mul_ps(_mm512_load_ps(at + 256 + i * 16), by.high));
    }
}

inline void store_lse(float* lse, int64_t rows, __m512 top, __m512 factor, __m512 sum) {
  const __m512 value = _mm512_fmadd_ps(_mm512_mul_ps(top, factor), _mm512_set1_ps(kLn2), log(sum));
  _mm512_mask_storeu_ps(lse, static_cast<__mmask16>(first_of_32(least(rows, 16))), value);
}

// One block of queries of one head; `before` is the first block of keys that is packed.
inline void forward_block(const Problem& p, const attention::Forward& to, const Item& item, int64_t head, int64_t block,
                          int64_t before, int64_t packed, const ForwardScratch& s) {
  const int64_t steps = ceil_div(p.d, kBlock), query = block * kBlock, rows = least(kBlock, item.last - query);
  const int64_t token = item.start + query, tile = kTileSize;
  for (int64_t i = 0; i < steps; ++i)
    put_turned(window(p.q, token, item.start + item.last, head, i * kBlock, p.d), s.queries + i * tile,
               s.queries + (steps + i) * tile);
  const __m512 factor = _mm512_set1_ps(factor_of(p)), nothing = _mm512_set1_ps(-__builtin_inff());
  const Blocks keys = seen_by(p, query, query + rows);
  Two top = {nothing, nothing}, sum = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t from = keys.first; from < keys.last; from += kChunk) {
    const int64_t count = least(kChunk, keys.last - from);
    tiles_follow();
    for (int64_t j = 0; j < count; ++j)
      product<false>({s.keys + (from + j - before) * 2 * steps * tile, tile, steps * tile},
                     {s.queries, tile, steps * tile}, steps, s.scores + j * kSums);
    for (int64_t j = 0; j < count; ++j) prepare(p, block, from + j, s.scores + j * kSums);
    const Two old = top;
    top = largest(s.scores, count, top);
    const Two shift = {_mm512_mul_ps(top.low, factor), _mm512_mul_ps(top.high, factor)};
    if (from > keys.first) {
      const Two by = {exp2(_mm512_fmsub_ps(old.low, factor, shift.low)),
                      exp2(_mm512_fmsub_ps(old.high, factor, shift.high))};
      sum = {_mm512_mul_ps(sum.low, by.low), _mm512_mul_ps(sum.high, by.high)};
      rescale(s.sums, steps, by);
    }
    for (int64_t j = 0; j < count; ++j)
      exponentials(s.scores + j * kSums, factor, shift, sum, s.shares + j * tile, s.shares + (kChunk + j) * tile);
    tiles_follow();
    for (int64_t i = 0; i < steps; ++i) {
      const Factor values = {s.values + (2 * i * packed + from - before) * tile, tile, packed * tile};
      const Factor shares = {s.shares, tile, kChunk * tile};
      if (from == keys.first) {
        product<false>(values, shares, count, s.sums + i * kSums);
      } else {
        product<true>(values, shares, count, s.sums + i * kSums);
      }
    }
    tiles_follow();
  }
  const __m512 one = _mm512_set1_ps(1.f);
  const Two by = zipped({_mm512_div_ps(one, sum.low), _mm512_div_ps(one, sum.high)});
  for (int64_t i = 0; i < steps; ++i)
    write_turned(s.sums + i * kSums, by, to.out + (token * p.heads + head) * p.d + i * kBlock, p.heads * p.d, rows,
                 p.d - i * kBlock);
  float* lse = to.lse + head * p.tokens + token;
  store_lse(lse, rows, top.low, factor, sum.low);
  if (rows > 16) store_lse(lse + 16, rows - 16, top.high, factor, sum.high);
}

inline void forward(const Problem& p, const attention::Forward& to, const Item& item, uint8_t* memory) {
  const MatrixUnit unit;
  const NoSubnormals quick;
  const ForwardScratch s = share_forward(p, item, memory);
  const Blocks keys = seen_by(p, item.first, item.last);
  const int64_t steps = ceil_div(p.d, kBlock), packed = keys.last - keys.first, end = item.start + item.last;
  for (int64_t j = 0; j < packed; ++j)
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t token = item.start + (keys.first + j) * kBlock, tile = kTileSize;
      put_rows(window(p.k, token, end, item.kv_head, i * kBlock, p.d), s.keys + (2 * j * steps + i) * tile,
               s.keys + ((2 * j + 1) * steps + i) * tile);
      put_zipped_turned(window(p.v, token, end, item.kv_head, i * kBlock, p.d), s.values + (2 * i * packed + j) * tile,
                        s.values + ((2 * i + 1) * packed + j) * tile);
    }
  for (int64_t h = 0; h < p.group(); ++h)
    for (int64_t block = item.first / kBlock; block < ceil_div(item.last, kBlock); ++block)
      forward_block(p, to, item, item.kv_head * p.group() + h, block, keys.first, packed, s);
}

}  // namespace gsf::GSF_ISA
