// Maths    out[n] = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u])
// Traffic  an example's factors: packed once, then read once for every 48 tokens; the products of 48 tokens with 256
//          stay in L2, so that no [tokens, tokens] matrix is ever written. bfloat16 rows with themselves are not even
//          packed where the processor multiplies pairs (common/grams.h)
#define GSF_ISA portable
#include "ghost_norm_sq/cpu.h"

#include <cmath>
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

// What one token adds: sum over u, and on the diagonal left1[t] . left2[t] and the same of the right factors.
struct Token {
  double sum, left, right;
};

// Runs `fill(side, first, last, column, width, block)` for every block of an example, of the lower triangle alone where
// both pairs are the same, and adds the products up.
template <typename Fill>
void tokens_of(const Kernels& run, bool same, int64_t tokens, int threads, Token* out, const Fill& fill) {
  parallel(threads, ceil_div(tokens, kRows), [&](int64_t task) {
    const int64_t first = task * kRows, last = least(first + kRows, tokens);
    float* block = block_scratch(0, 2 * kRows * kCols);
    for (int64_t t = first; t < last; ++t) out[t] = {0.0, 0.0, 0.0};
    for (int64_t u = 0; u < (same ? last : tokens); u += kCols) {
      const int64_t width = least(kCols, (same ? last : tokens) - u);
      fill(0, first, last, u, width, block);
      fill(1, first, last, u, width, block + kRows * kCols);
      const Matrix l{reinterpret_cast<const char*>(block), last - first, kCols, kCols, 1, DType::kFloat32};
      const float* r = block + kRows * kCols;
      for (int64_t t = first; t < last; ++t) {
        const int64_t below = same ? most(0, least(width, t - u)) : width, row = t - first;
        float sum = 0.0f;
        run.row_dots(l, 0, below, r + row * kCols, kCols, row, row + 1, &sum, 1, kernel_scratch());
        out[t].sum += same ? 2.0 * sum : sum;
        if (same && t >= u && t < u + width) {
          out[t].left = static_cast<double>(block[row * kCols + t - u]);
          out[t].right = static_cast<double>(r[row * kCols + t - u]);
          out[t].sum += out[t].left * out[t].right;
        }
      }
    }
  });
}

double total_of(const Token* tokens, int64_t count) {
  double total = 0.0;
  for (int64_t t = 0; t < count; ++t) total += tokens[t].sum;
  return total;
}

// Whether `gram` counted nothing as zero that matters. An element of X = x x^T is off by at most e = tiny d (1 + 2
// |x|), tiny = 2^-126 and |x| the longest row; |X[t, u]| adds up to at most `tokens` times X's trace. So left * right
// is off by at most e_l (tokens trace_r) + e_r (tokens trace_l) + tokens^2 e_l e_r, which is held against eps of the
// diagonal's products alone. False for a sum that is not a number, too.
bool nothing_lost(const Token* tokens, int64_t count, int64_t left_width, int64_t right_width) {
  double traces[2] = {0.0, 0.0}, longest[2] = {0.0, 0.0}, diagonal = 0.0, off[2];
  for (int64_t t = 0; t < count; ++t) {
    const double values[2] = {tokens[t].left, tokens[t].right};
    for (int s = 0; s < 2; ++s) {
      traces[s] += values[s];
      longest[s] = values[s] > longest[s] ? values[s] : longest[s];
    }
    diagonal += values[0] * values[1];
  }
  for (int s = 0; s < 2; ++s)
    off[s] = 0x1p-126 * static_cast<double>(s == 0 ? left_width : right_width) * (1.0 + 2.0 * std::sqrt(longest[s]));
  const double n = static_cast<double>(count);
  return off[0] * n * traces[1] + off[1] * n * traces[0] + n * n * off[0] * off[1] <= 0x1p-24 * diagonal;
}

bool lies_in_pairs(const Factor& x) {
  return x.ids == nullptr && x.matrix.dtype == DType::kBFloat16 && x.matrix.col_stride == 1;
}

float example(const Kernels& run, const Factor (&left)[2], const Factor (&right)[2], bool same, int64_t start,
              int64_t tokens, int threads) {
  static thread_local Buffer stores[3];
  Token* rows = stores[2].get<Token>(tokens);
  if (same && run.gram != nullptr && lies_in_pairs(left[0]) && lies_in_pairs(right[0])) {
    const Matrix x[2] = {left[0].matrix.rows_from(start, tokens), right[0].matrix.rows_from(start, tokens)};
    tokens_of(run, same, tokens, threads, rows,
              [&](int side, int64_t first, int64_t last, int64_t column, int64_t width, float* block) {
                run.gram(x[side], first, last, column, width, block, kCols);
              });
    if (nothing_lost(rows, tokens, x[0].cols, x[1].cols)) return static_cast<float>(total_of(rows, tokens));
  }
  const Side sides[2] = {side(run, left, start, tokens, threads, stores[0]),
                         side(run, right, start, tokens, threads, stores[1])};
  tokens_of(run, same, tokens, threads, rows,
            [&](int side, int64_t first, int64_t last, int64_t column, int64_t width, float* block) {
              fill(run, sides[side], first, last, column, width, block);
            });
  const double total = total_of(rows, tokens);
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
