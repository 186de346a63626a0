// Maths    u[t, k] = sum_i g[t, i] r[k, ids[t], i]
// Traffic  g: one read (for further directions from L1); one row of r for each token and direction; u: one write
#include "embedding_dot/cpu.h"

#include "common/memory.h"
#include "common/packing.h"
#include "common/pool.h"

namespace gsf {

void embedding_dot(const int64_t* ids, const Matrix& g, const Matrix& r, int64_t directions, int64_t r_step, float* u,
                   int threads, Isa isa) {
  constexpr int64_t kRows = 64;
  const Kernels& run = kernels(isa);
  // a gathered element waits for memory: it weighs as much as sixteen multiply-adds of a product
  threads = useful_threads(threads, 16 * g.rows * g.cols * directions);
  parallel(threads, ceil_div(g.rows, kRows), [&](int64_t task) {
    for (int64_t t = task * kRows; t < least((task + 1) * kRows, g.rows); ++t)
      for (int64_t k = 0; k < directions; ++k) {
        Matrix table = r;
        table.data += k * r_step * size_of(r.dtype);
        u[t * directions + k] = run.dot(g, t, table, ids[t], kernel_scratch());
      }
  });
}

}  // namespace gsf
