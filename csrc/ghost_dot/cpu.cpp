// Maths    u[t, k] = sum_o g[t, o] (sum_i r[k, o, i] a[t, i]), 256 columns o at a time
// Traffic  r: one read, packed 256 rows at a time; a: one read for every 256 columns of r; g: one read; u: 4 bytes a
//          token and direction, once for every 256 columns. r a[t] is never written: 256 of its columns stay in L2.
#include "ghost_dot/cpu.h"

#include "common/packing.h"
#include "common/pool.h"

namespace gsf {

void ghost_dot(const Matrix& a, const Matrix& g, const Matrix& r, int64_t directions, int64_t r_step, float* u,
               int threads, Isa isa) {
  constexpr int64_t kGroup = 16;  // panels
  static thread_local Buffer store;
  const Kernels& run = kernels(isa);
  for (int64_t i = 0; i < a.rows * directions; ++i) u[i] = 0.0f;
  const bool split = wants_split(run, a, r.rows);
  const int64_t rows = split ? (a.rows >= 1024 ? 256 : 64) : 8 * run.row_block, ld = kGroup * kPanel;
  for (int64_t k = 0; k < directions; ++k)
    for (int64_t column = 0; column < r.rows; column += ld) {
      Matrix part = r.rows_from(column, least(ld, r.rows - column));
      part.data += k * r_step * size_of(r.dtype);
      const Packed b = pack(run, part.transposed(), split, threads, store);
      const int64_t panels = ceil_div(part.rows, kPanel);
      parallel(useful_threads(threads, a.rows * a.cols * part.rows), ceil_div(a.rows, rows), [&](int64_t task) {
        const int64_t first = task * rows, last = least(first + rows, a.rows);
        float* block = block_scratch(0, rows * ld);
        run.product(a, b, first, last, 0, panels, block, ld, kernel_scratch());
        run.row_dots(g, column, part.rows, block, ld, first, last, u + first * directions + k, directions,
                     kernel_scratch());
      });
    }
  store.trim();
}

}  // namespace gsf
