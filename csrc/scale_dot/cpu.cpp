// Maths    u[t, k] = sum_i g[t, i] x_hat[t, i] r[k, i]
// Traffic  g and x_hat: one read; their product: 1024 elements at a time, in L1; r: from L2 for every token;
//          u: one write
#include "scale_dot/cpu.h"

#include "common/memory.h"
#include "common/packing.h"
#include "common/pool.h"

namespace gsf {

void scale_dot(const Matrix* x_hat, const Matrix& g, const Matrix& r, float* u, int threads, Isa isa) {
  constexpr int64_t kRows = 64;
  const Kernels& run = kernels(isa);
  // an element that is read once waits for memory: it weighs as much as eight multiply-adds of a product
  threads = useful_threads(threads, (8 + r.rows) * g.rows * g.cols);
  parallel(threads, ceil_div(g.rows, kRows), [&](int64_t task) {
    for (int64_t t = task * kRows; t < least((task + 1) * kRows, g.rows); ++t)
      run.scale_dots(x_hat, g, t, r, u + t * r.rows, kernel_scratch());
  });
}

}  // namespace gsf
