// Maths    out[n, m] = sum_{t in n, u in m} (a1[t] . a2[u]) (g1[t] . g2[u])
// Traffic  a2 and g2: packed once; a1 and g1: one read for every 1024 tokens u; the products of 64 tokens t with 256
//          tokens u stay in L2, so that no [tokens, tokens] matrix is ever written; 8 bytes a token t and example m
#include "ghost_gram/cpu.h"

#include <vector>

#include "common/memory.h"
#include "common/packing.h"
#include "common/pool.h"

namespace gsf {
namespace {

constexpr int64_t kRows = 64;           // tokens t of one task
constexpr int64_t kCols = 16 * kPanel;  // tokens u that are multiplied at once
constexpr int64_t kSpan = 4 * kCols;    // tokens u that are packed at once

// Tokens [start, end) of the right batch, packed, and the examples [from, to) that have some of them.
struct Span {
  int64_t start, end, from, to;
  Packed a, g;
};

// sums[t, m - from] = sum_{u in m and span} (a1[t] . a2[u]) (g1[t] . g2[u]) for t in [first, last)
void multiply(const Kernels& run, const Batch& left, const Batch& right, const Span& s, int64_t first, int64_t last,
              double* sums) {
  const int64_t width = s.to - s.from, rows = last - first;
  float *block = block_scratch(0, 2 * kRows * kCols), *other = block + kRows * kCols;
  const Matrix products{reinterpret_cast<const char*>(block), rows, kCols, kCols, 1, DType::kFloat32};
  for (int64_t i = first * width; i < last * width; ++i) sums[i] = 0.0;
  int64_t m = s.from;
  for (int64_t u = s.start; u < s.end; u += kCols) {
    const int64_t stop = least(u + kCols, s.end), panel = (u - s.start) / kPanel;
    const int64_t panel_end = panel + ceil_div(stop - u, kPanel);
    run.product(left.a, s.a, first, last, panel, panel_end, block, kCols, kernel_scratch());
    run.product(left.g, s.g, first, last, panel, panel_end, other, kCols, kernel_scratch());
    for (; m < s.to && right.bounds[m] < stop; ++m) {
      const int64_t begin = most(right.bounds[m], u), end = least(right.bounds[m + 1], stop);
      if (begin < end) {
        float part[kRows] = {};
        run.row_dots(products, begin - u, end - begin, other + begin - u, kCols, 0, rows, part, 1, kernel_scratch());
        for (int64_t t = 0; t < rows; ++t) sums[(first + t) * width + m - s.from] += static_cast<double>(part[t]);
      }
      if (right.bounds[m + 1] > stop) break;  // it goes on in the next block
    }
  }
}

}  // namespace

void ghost_gram(const Batch& left, const Batch& right, float* out, int threads, Isa isa) {
  static thread_local Buffer stores[3];
  const Kernels& run = kernels(isa);
  std::vector<double> total(left.examples * right.examples, 0.0);
  const int64_t depth = left.a.cols + left.g.cols;
  for (int64_t start = 0, from = 0; start < right.a.rows; start += kSpan) {
    const int64_t end = least(start + kSpan, right.a.rows);
    while (right.bounds[from + 1] <= start) ++from;
    int64_t to = from + 1;
    while (right.bounds[to] < end) ++to;
    const auto packed = [&](const Matrix& x, const Matrix& y, Buffer& store) {
      return pack(run, y.rows_from(start, end - start).transposed(), wants_split(run, x, end - start), threads, store);
    };
    const Span span{start, end, from, to, packed(left.a, right.a, stores[0]), packed(left.g, right.g, stores[1])};
    double* sums = stores[2].get<double>(left.a.rows * (to - from));
    parallel(useful_threads(threads, left.a.rows * (end - start) * depth), ceil_div(left.a.rows, kRows),
             [&](int64_t task) {
               multiply(run, left, right, span, task * kRows, least((task + 1) * kRows, left.a.rows), sums);
             });
    for (int64_t n = 0; n < left.examples; ++n)
      for (int64_t t = left.bounds[n]; t < left.bounds[n + 1]; ++t)
        for (int64_t m = from; m < to; ++m) total[n * right.examples + m] += sums[t * (to - from) + m - from];
  }
  for (size_t i = 0; i < total.size(); ++i) out[i] = static_cast<float>(total[i]);
  for (Buffer& store : stores) store.trim();
}

}  // namespace gsf
