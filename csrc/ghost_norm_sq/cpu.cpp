// Maths    out[n] = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u])
// Traffic  an example's factors: packed once, then read once for every 48 tokens; the products of 48 tokens with 256
//          stay in L2, so that no [tokens, tokens] matrix is ever written
#define GSF_ISA portable
#include "ghost_norm_sq/cpu.h"

#include <initializer_list>

#include "common/memory.h"
#include "common/packing.h"
#include "common/pool.h"
#include "common/simd.h"

namespace gsf {
namespace {

constexpr int64_t kRows = 48;           // tokens t of one task
constexpr int64_t kCols = 16 * kPanel;  // tokens u that are multiplied at once

// One side of the product within an example of `tokens` tokens that begins at `start`.
struct Side {
  Factor x, y;
  Packed packed;
};

Side side(const Kernels& run, const Factor (&pair)[2], int64_t start, int64_t tokens, int threads, Buffer& store) {
  Side out{pair[0], pair[1], {}};
  for (Factor* factor : {&out.x, &out.y}) {
    if (factor->ids != nullptr) {
      factor->ids += start;
    } else {
      factor->matrix = factor->matrix.rows_from(start, tokens);
    }
  }
  if (out.x.ids == nullptr && out.y.ids == nullptr)
    out.packed = pack(run, out.y.matrix.transposed(), wants_split(run, out.x.matrix, tokens), threads, store);
  return out;
}

float element(const Matrix& m, int64_t i, int64_t j) {
  return portable::load1(m.at(i, j), m.dtype);
}

// block[t - first, u - column] = x[t] . y[u]
void fill(const Kernels& run, const Side& s, int64_t first, int64_t last, int64_t column, int64_t width, float* block) {
  if (s.x.ids == nullptr && s.y.ids == nullptr) {
    run.product(s.x.matrix, s.packed, first, last, column / kPanel, ceil_div(column + width, kPanel), block, kCols,
                kernel_scratch());
    return;
  }
  for (int64_t t = first; t < last; ++t)
    for (int64_t u = column; u < column + width; ++u) {
      float& to = block[(t - first) * kCols + u - column];
      if (s.x.ids == nullptr) {
        to = element(s.x.matrix, t, s.y.ids[u]);
      } else if (s.y.ids == nullptr) {
        to = element(s.y.matrix, u, s.x.ids[t]);
      } else {
        to = s.x.ids[t] == s.y.ids[u] ? 1.0f : 0.0f;
      }
    }
}

float example(const Kernels& run, const Factor (&left)[2], const Factor (&right)[2], bool same, int64_t start,
              int64_t tokens, int threads) {
  static thread_local Buffer stores[3];
  const Side sides[2] = {side(run, left, start, tokens, threads, stores[0]),
                         side(run, right, start, tokens, threads, stores[1])};
  double* rows = stores[2].get<double>(tokens);
  parallel(threads, ceil_div(tokens, kRows), [&](int64_t task) {
    const int64_t first = task * kRows, last = least(first + kRows, tokens);
    float* block = block_scratch(0, 2 * kRows * kCols);
    for (int64_t t = first; t < last; ++t) rows[t] = 0.0;
    for (int64_t u = 0; u < (same ? last : tokens); u += kCols) {
      const int64_t width = least(kCols, (same ? last : tokens) - u);
      fill(run, sides[0], first, last, u, width, block);
      fill(run, sides[1], first, last, u, width, block + kRows * kCols);
      const Matrix l{reinterpret_cast<const char*>(block), last - first, kCols, kCols, 1, DType::kFloat32};
      const float* r = block + kRows * kCols;
      for (int64_t t = first; t < last; ++t) {
        const int64_t below = same ? most(0, least(width, t - u)) : width, row = t - first;
        float sum = 0.0f;
        run.row_dots(l, 0, below, r + row * kCols, kCols, row, row + 1, &sum, 1, kernel_scratch());
        rows[t] += same ? 2.0 * sum : sum;
        if (same && t >= u && t < u + width)
          rows[t] += static_cast<double>(block[row * kCols + t - u]) * static_cast<double>(r[row * kCols + t - u]);
      }
    }
  });
  double total = 0.0;
  for (int64_t t = 0; t < tokens; ++t) total += rows[t];
  for (Buffer& store : stores) store.trim();
  return static_cast<float>(total);
}

}  // namespace

void ghost_inner(const Factor (&left)[2], const Factor (&right)[2], bool same, const int64_t* spans, int64_t examples,
                 float* out, int threads, Isa isa) {
  const Kernels& run = kernels(isa);
  int64_t work = 0, width = 0;
  const auto length = [spans](int64_t n) { return spans[2 * n + 1] - spans[2 * n]; };
  for (const Factor* factor : {&left[0], &right[0]}) width += factor->ids == nullptr ? factor->matrix.cols : 16;
  for (int64_t n = 0; n < examples; ++n) work += length(n) * length(n) * width;
  threads = useful_threads(threads, work);
  // Many examples are shared out whole; of a few, each is shared out by tokens. Either way a token's sum is the same.
  const bool whole = examples >= 4 * threads;
  parallel(whole ? threads : 1, examples,
           [&](int64_t n) { out[n] = example(run, left, right, same, spans[2 * n], length(n), whole ? 1 : threads); });
}

}  // namespace gsf
