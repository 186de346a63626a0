// Attention's backward pass for one item: all queries of the heads that share one key head, so that dK and dV are sums
// of one thread in one order.
//
// Maths    P^T = exp(S^T - lse),  D = sum_d dO O,  dS^T = P^T (dP^T - D) z'     S^T = K Q^T, dP^T = V dO^T
//          dV = P^T dO,  dK = dS^T Q scale,  dQ^T = K^T dS^T scale              z': the softcap's derivative
//          Keys down the rows, queries along them: lse and D are plain vectors, P^T and dS^T are left factors as they
//          are, and pairs of dS^T's rows are the right factor of dQ^T.
// Traffic  q, dout: one read each as rows and as columns, packed 2 x 2 B an element; k, v: one read for the heads of a
//          group; P, dS: 128 x 128 at a time, in L1 and L2; dk, dv: 4 B an element in L2, read and written once for
//          every 128 queries of a head
#pragma once

#include "varlen_attention/scores.h"

namespace gsf::GSF_ISA {

constexpr int64_t kSquare = 4;  // blocks of queries, and blocks of keys, whose P and dS are held together

struct BackwardScratch {
  uint16_t *keys, *keys_turned, *values;        // [blocks][2][steps]; [steps][2][blocks]; as keys
  uint16_t *queries, *gradients;                // [kSquare][2][steps] Q^T, dO^T
  uint16_t *queries_zipped, *gradients_zipped;  // [steps][2][kSquare] Q, dO
  uint16_t *shares, *slopes, *slopes_zipped;    // [kSquare][2][kSquare] P^T, dS^T; dS^T zipped
  float *scores, *dots;                         // one result each: S^T, dP^T
  float* dq;                                    // [kSquare][steps] results, transposed
  float *dk, *dv;                               // [blocks][steps] results
  float *lse, *d;                               // [kSquare * kBlock], lse in units of log 2
  int64_t bytes;
};

inline BackwardScratch share_backward(const Problem& p, const Item& item, uint8_t* memory) {
  const int64_t steps = ceil_div(p.d, kBlock), blocks = ceil_div(item.length, kBlock);
  uint16_t* at = reinterpret_cast<uint16_t*>(memory);
  const auto take = [&at](int64_t tiles) {
    uint16_t* start = at;
    at += tiles * kTileSize;
    return start;
  };
  const auto take_results = [&take](int64_t results) { return reinterpret_cast<float*>(take(4 * results)); };
  BackwardScratch s;
  s.scores = take_results(1);
  s.dots = take_results(1);
  s.lse = reinterpret_cast<float*>(take(1));
  s.d = s.lse + kSquare * kBlock;
  static_assert(2 * kSquare * kBlock * 4 <= kTileSize * 2, "both fit one tile");
  s.shares = take(2 * kSquare * kSquare);
  s.slopes = take(2 * kSquare * kSquare);
  s.slopes_zipped = take(2 * kSquare * kSquare);
  s.queries = take(2 * kSquare * steps);
  s.gradients = take(2 * kSquare * steps);
  s.queries_zipped = take(2 * kSquare * steps);
  s.gradients_zipped = take(2 * kSquare * steps);
  s.dq = take_results(kSquare * steps);
  s.keys = take(2 * blocks * steps);
  s.keys_turned = take(2 * blocks * steps);
  s.values = take(2 * blocks * steps);
  s.dk = take_results(blocks * steps);
  s.dv = take_results(blocks * steps);
  s.bytes = (at - reinterpret_cast<uint16_t*>(memory)) * 2;
  return s;
}

inline int64_t backward_bytes(const Problem& p, const Item& item) {
  return share_backward(p, item, nullptr).bytes;
}

inline void pack_keys(const Problem& p, const Item& item, const BackwardScratch& s) {
  const int64_t steps = ceil_div(p.d, kBlock), blocks = ceil_div(item.length, kBlock), tile = kTileSize;
  const int64_t end = item.start + item.length;
  for (int64_t j = 0; j < blocks; ++j)
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t token = item.start + j * kBlock, first = (2 * j * steps + i) * tile, second = first + steps * tile;
      const Window k = window(p.k, token, end, item.kv_head, i * kBlock, p.d);
      put_rows(k, s.keys + first, s.keys + second);
      put_zipped_turned(k, s.keys_turned + (2 * i * blocks + j) * tile,
                        s.keys_turned + ((2 * i + 1) * blocks + j) * tile);
      put_rows(window(p.v, token, end, item.kv_head, i * kBlock, p.d), s.values + first, s.values + second);
    }
}

// sum_d out dout of 16 tokens: products are exact in float32.
inline __m512 row_dots(const Tokens& x, const Tokens& y, int64_t token, int64_t rows, int64_t head, int64_t d) {
  __m512i sums[16];
  for (int64_t r = 0; r < 16; ++r) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t k = 0; r < rows && k < d; k += kBlock) {
      const __mmask32 keep = first_of_32(d - k);
      const __m512i a = _mm512_maskz_loadu_epi16(keep, x.at(token + r, head) + k);
      const __m512i b = _mm512_maskz_loadu_epi16(keep, y.at(token + r, head) + k);
      low = _mm512_fmadd_ps(widen(_mm512_castsi512_si256(a)), widen(_mm512_castsi512_si256(b)), low);
      high = _mm512_fmadd_ps(widen(_mm512_extracti64x4_epi64(a, 1)), widen(_mm512_extracti64x4_epi64(b, 1)), high);
    }
    sums[r] = _mm512_castps_si512(_mm512_add_ps(low, high));
  }
  transpose(sums);
  for (int64_t step = 8; step > 0; step /= 2)
    for (int64_t r = 0; r < step; ++r)
      sums[r] = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(sums[r]), _mm512_castsi512_ps(sums[r + step])));
  return _mm512_castsi512_ps(sums[0]);
}

// Block `block` of queries, the `slot`-th of those that are held: its forms, lse and D. Rows beyond the end are zeros,
// and their lse too: their P is finite, and their dO and D are zero.
inline void pack_queries(const Problem& p, const attention::Backward& with, const Item& item, int64_t head,
                         int64_t block, int64_t slot, const BackwardScratch& s) {
  const int64_t steps = ceil_div(p.d, kBlock), tile = kTileSize, token = item.start + block * kBlock;
  const int64_t end = item.start + item.length;
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t first = (2 * slot * steps + i) * tile, second = first + steps * tile;
    const int64_t zipped_first = (2 * i * kSquare + slot) * tile, zipped_second = zipped_first + kSquare * tile;
    const Window q = window(p.q, token, end, head, i * kBlock, p.d);
    put_turned(q, s.queries + first, s.queries + second);
    put_zipped(q, s.queries_zipped + zipped_first, s.queries_zipped + zipped_second);
    const Window g = window(with.dout, token, end, head, i * kBlock, p.d);
    put_turned(g, s.gradients + first, s.gradients + second);
    put_zipped(g, s.gradients_zipped + zipped_first, s.gradients_zipped + zipped_second);
  }
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t from = token + 16 * half, rows = most(0, least(16, end - from)), at = slot * kBlock + 16 * half;
    const __mmask16 here = static_cast<__mmask16>(first_of_32(rows));
    const __m512 lse = _mm512_maskz_loadu_ps(here, with.lse + head * p.tokens + from);
    _mm512_store_ps(s.lse + at, _mm512_mul_ps(lse, _mm512_set1_ps(kLog2E)));
    _mm512_store_ps(s.d + at, row_dots(with.out, with.dout, from, rows, head, p.d));
  }
}

// P^T and dS^T of one block from S^T and dP^T.
template <bool kMasked, bool kBent>
inline void slopes(const Problem& p, const BackwardScratch& s, int64_t queries, int64_t keys, int64_t slot,
                   uint16_t* share, uint16_t* slope, uint16_t* zip_first, uint16_t* zip_second) {
  const __m512 factor = _mm512_set1_ps(factor_of(p));
  const float *lse = s.lse + slot * kBlock, *d = s.d + slot * kBlock;
  const __m512 shift[2] = {_mm512_load_ps(lse), _mm512_load_ps(lse + 16)};
  const __m512 mean[2] = {_mm512_load_ps(d), _mm512_load_ps(d + 16)};
  for (int64_t pair = 0; pair < 16; ++pair) {
    const int64_t at = pair / 8 * 512 + pair % 8 * 32;
    __m512i rows[2];
    for (int64_t j = 0; j < 2; ++j) {
      __m512 e[2], g[2];
      for (int64_t half = 0; half < 2; ++half) {
        const __m512 score = _mm512_load_ps(s.scores + at + half * 256 + j * 16);
        __m512 by = _mm512_set1_ps(1.f);
        if (kBent) {
          const Two bent = bend(p, score);
          by = bent.high;
          e[half] = exp2(_mm512_sub_ps(bent.low, shift[half]));
        } else {
          e[half] = exp2(_mm512_fmsub_ps(score, factor, shift[half]));
        }
        if (kMasked) {
          const __mmask16 keep = sees(p, queries * kBlock + 16 * half, keys * kBlock + 2 * pair + j);
          e[half] = _mm512_maskz_mov_ps(keep, e[half]);
        }
        const __m512 dot = _mm512_load_ps(s.dots + at + half * 256 + j * 16);
        g[half] = _mm512_mul_ps(e[half], _mm512_sub_ps(dot, mean[half]));
        if (kBent) g[half] = _mm512_mul_ps(g[half], by);
      }
      const int64_t row = pair / 8 * kSquare * kTileSize + (2 * pair + j) % 16 * 32;  // second tile: keys 16-31
      _mm512_store_si512(share + row, narrow(e[0], e[1]));
      rows[j] = narrow(g[0], g[1]);
      _mm512_store_si512(slope + row, rows[j]);
    }
    __m512i halves[2];
    zip(rows[0], rows[1], halves);
    _mm512_store_si512(zip_first + pair * 32, halves[0]);
    _mm512_store_si512(zip_second + pair * 32, halves[1]);
  }
}

// A square of blocks: queries from block `queries` on, `query_count` of them (packed in the slots), and keys likewise.
struct Square {
  int64_t queries, query_count, keys, key_count;
};

inline void square_slopes(const Problem& p, const Square& x, const BackwardScratch& s) {
  const int64_t steps = ceil_div(p.d, kBlock), tile = kTileSize;
  for (int64_t slot = 0; slot < x.query_count; ++slot) {
    const int64_t block = x.queries + slot;
    const Blocks seen = seen_by(p, block * kBlock, (block + 1) * kBlock);
    for (int64_t key = most(seen.first, x.keys); key < least(seen.last, x.keys + x.key_count); ++key) {
      const int64_t at = key - x.keys, packed = 2 * key * steps * tile, held = 2 * slot * steps * tile;
      tiles_follow();
      product<false>({s.keys + packed, tile, steps * tile}, {s.queries + held, tile, steps * tile}, steps, s.scores);
      product<false>({s.values + packed, tile, steps * tile}, {s.gradients + held, tile, steps * tile}, steps, s.dots);
      tiles_follow();
      uint16_t *share = s.shares + (2 * at * kSquare + slot) * tile,
               *slope = s.slopes + (2 * at * kSquare + slot) * tile;
      uint16_t* zip_first = s.slopes_zipped + (2 * slot * kSquare + at) * tile;
      uint16_t* zip_second = zip_first + kSquare * tile;
      const bool masked = partly_seen(p, block, key);
      const auto run = masked ? (bends(p) ? slopes<true, true> : slopes<true, false>)
                              : (bends(p) ? slopes<false, true> : slopes<false, false>);
      run(p, s, block, key, slot, share, slope, zip_first, zip_second);
    }
  }
}

inline void add_product(bool add, Factor x, Factor y, int64_t steps, float* c) {
  if (add) {
    product<true>(x, y, steps, c);
  } else {
    product<false>(x, y, steps, c);
  }
}

// dK and dV of the square's keys. `first_head`: nothing was added before the square on the diagonal.
inline void square_keys(const Problem& p, const Square& x, bool first_head, const BackwardScratch& s) {
  const int64_t steps = ceil_div(p.d, kBlock), tile = kTileSize;
  for (int64_t key = x.keys; key < x.keys + x.key_count; ++key) {
    const Blocks by = seeing(p, key, x.queries + x.query_count);
    const int64_t first = most(by.first, x.queries), count = by.last - first;
    if (count <= 0) continue;
    const bool add = !(first_head && first == key);
    const int64_t left = (2 * (key - x.keys) * kSquare + first - x.queries) * tile;
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t right = (2 * i * kSquare + first - x.queries) * tile, to = (key * steps + i) * kSums;
      add_product(add, {s.shares + left, tile, kSquare * tile}, {s.gradients_zipped + right, tile, kSquare * tile},
                  count, s.dv + to);
      add_product(add, {s.slopes + left, tile, kSquare * tile}, {s.queries_zipped + right, tile, kSquare * tile}, count,
                  s.dk + to);
    }
  }
}

// dQ^T of the square's queries.
inline void square_queries(const Problem& p, const Square& x, int64_t blocks, const BackwardScratch& s) {
  const int64_t steps = ceil_div(p.d, kBlock), tile = kTileSize;
  for (int64_t slot = 0; slot < x.query_count; ++slot) {
    const int64_t block = x.queries + slot;
    const Blocks seen = seen_by(p, block * kBlock, (block + 1) * kBlock);
    const int64_t first = most(seen.first, x.keys), count = least(seen.last, x.keys + x.key_count) - first;
    if (count <= 0) continue;
    for (int64_t i = 0; i < steps; ++i)
      add_product(first > seen.first, {s.keys_turned + (2 * i * blocks + first) * tile, tile, blocks * tile},
                  {s.slopes_zipped + (2 * slot * kSquare + first - x.keys) * tile, tile, kSquare * tile}, count,
                  s.dq + (slot * steps + i) * kSums);
  }
}

inline void backward(const Problem& p, const attention::Backward& with, const Item& item, uint8_t* memory) {
  const MatrixUnit unit;
  const NoSubnormals quick;
  const BackwardScratch s = share_backward(p, item, memory);
  const int64_t steps = ceil_div(p.d, kBlock), blocks = ceil_div(item.length, kBlock);
  const Two scale = {_mm512_set1_ps(p.scale), _mm512_set1_ps(p.scale)};
  pack_keys(p, item, s);
  for (int64_t h = 0; h < p.group(); ++h) {
    const int64_t head = item.kv_head * p.group() + h;
    for (int64_t from = 0; from < blocks; from += kSquare) {
      Square x = {from, least(kSquare, blocks - from), 0, 0};
      for (int64_t slot = 0; slot < x.query_count; ++slot) pack_queries(p, with, item, head, from + slot, slot, s);
      const Blocks seen = seen_by(p, from * kBlock, (from + x.query_count) * kBlock);
      // squares of keys lie where they would for any query
      for (x.keys = seen.first / kSquare * kSquare; x.keys < seen.last; x.keys += kSquare) {
        x.key_count = least(kSquare, seen.last - x.keys);
        square_slopes(p, x, s);
        tiles_follow();
        square_keys(p, x, h == 0, s);
        square_queries(p, x, blocks, s);
        tiles_follow();
      }
      for (int64_t slot = 0; slot < x.query_count; ++slot) {
        const int64_t query = (from + slot) * kBlock, token = item.start + query;
        for (int64_t i = 0; i < steps; ++i)
          write_turned(s.dq + (slot * steps + i) * kSums, scale, with.dq + (token * p.heads + head) * p.d + i * kBlock,
                       p.heads * p.d, item.length - query, p.d - i * kBlock);
      }
    }
  }
  for (int64_t j = 0; j < blocks; ++j)
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t key = j * kBlock, stride = p.kv_heads * p.d, rows = item.length - key, columns = p.d - i * kBlock;
      const int64_t to = (item.start + key) * stride + item.kv_head * p.d + i * kBlock;
      write_rows(s.dk + (j * steps + i) * kSums, p.scale, with.dk + to, stride, rows, columns);
      write_rows(s.dv + (j * steps + i) * kSums, 1.f, with.dv + to, stride, rows, columns);
    }
}

}  // namespace gsf::GSF_ISA
