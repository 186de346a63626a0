// Maths    out[n] = sum_{t in n} (p_out^T g[t]) (p_in^T a[t])^T
// Traffic  a and g: one read; both projections: one write, then one read for every four rows of out; out: one write
#include "ghost_project/cpu.h"

#include "common/memory.h"
#include "common/packing.h"
#include "common/pool.h"
#include "ghost_dot_lowrank/cpu.h"

namespace gsf {

void ghost_project(const Matrix& a, const Matrix& g, const Matrix& p_in, const Matrix& p_out, const int64_t* bounds,
                   int64_t examples, float* out, int threads, Isa isa) {
  static thread_local Buffer projected;
  constexpr int64_t kRows = 16;  // rows of out that one task writes
  const Kernels& run = kernels(isa);
  const int64_t right_ld = ceil_div(p_in.cols, kPanel) * kPanel, left_ld = ceil_div(p_out.cols, kPanel) * kPanel;
  float* right = projected.get<float>(a.rows * (right_ld + left_ld));
  float* left = right + a.rows * right_ld;
  lowrank_project(a, p_in, right, right_ld, true, threads, isa);
  lowrank_project(g, p_out, left, left_ld, true, threads, isa);
  const int64_t parts = ceil_div(p_out.cols, kRows);
  parallel(useful_threads(threads, a.rows * left_ld * right_ld), examples * parts, [&](int64_t task) {
    const int64_t n = task / parts, first = task % parts * kRows, start = bounds[n];
    run.outer(left + start * left_ld, left_ld, right + start * right_ld, right_ld, bounds[n + 1] - start, first,
              least(first + kRows, p_out.cols), p_in.cols, out + n * p_out.cols * p_in.cols, p_in.cols);
  });
  projected.trim();
}

}  // namespace gsf
