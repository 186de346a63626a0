// Maths    z[t, j] = sum_i a[t, i] q[i, j];   u[t, k] = sum_j member[j, k] z[t, j] (sum_o g[t, o] p[o, j])
// Traffic  a and g: one read each; q and p: packed once for each call, then from L2 for every block of tokens; z: one
//          write, one read; u: one write. The product g p stays in L1.
#include "ghost_dot_lowrank/cpu.h"

#include <cstring>
#include <vector>

#include "common/packing.h"
#include "common/pool.h"

namespace gsf {
namespace {

Buffer& packed_store() {
  static thread_local Buffer store;
  return store;
}

// The rows of `member` [ranks, directions] by direction, and the panels that each has a part in.
struct Owners {
  std::vector<float> of;
  std::vector<int64_t> begin, end;

  Owners(const float* member, int64_t ranks, int64_t directions, int64_t columns)
      : of(directions * columns), begin(directions, 0), end(directions, 0) {
    for (int64_t k = 0; k < directions; ++k)
      for (int64_t j = 0; j < ranks; ++j) {
        const float share = member[j * directions + k];
        if (share == 0.0f) continue;
        of[k * columns + j] = share;
        if (end[k] == 0) begin[k] = j / kPanel;
        end[k] = j / kPanel + 1;
      }
  }
};

}  // namespace

void lowrank_project(const Matrix& a, const Matrix& q, float* z, int64_t ld, bool padded, int threads, Isa isa) {
  const Kernels& run = kernels(isa);
  const Packed b = pack(run, q, wants_split(run, a, q.cols), threads, packed_store());
  const int64_t panels = ceil_div(q.cols, kPanel), rows = task_rows(run, b, a.rows);
  const bool direct = padded || q.cols % kPanel == 0;
  parallel(useful_threads(threads, a.rows * a.cols * panels * kPanel), ceil_div(a.rows, rows), [&](int64_t task) {
    const int64_t first = task * rows, last = least(first + rows, a.rows);
    if (direct) {
      run.product(a, b, first, last, 0, panels, z + first * ld, ld, kernel_scratch());
      return;
    }
    float* block = block_scratch(0, rows * panels * kPanel);
    run.product(a, b, first, last, 0, panels, block, panels * kPanel, kernel_scratch());
    for (int64_t t = first; t < last; ++t)
      std::memcpy(z + t * ld, block + (t - first) * panels * kPanel, static_cast<size_t>(q.cols) * sizeof(float));
  });
  packed_store().trim();
}

void lowrank_contract(const Matrix& z, const Matrix& g, const Matrix& p, const float* member, int64_t directions,
                      float* u, int threads, Isa isa) {
  const Kernels& run = kernels(isa);
  const Packed b = pack(run, p, wants_split(run, g, p.cols), threads, packed_store());
  const int64_t panels = ceil_div(p.cols, kPanel), rows = task_rows(run, b, g.rows), ld = panels * kPanel;
  const Owners owners(member, p.cols, directions, ld);
  const Members members{owners.of.data(), owners.begin.data(), owners.end.data(), directions, ld};
  parallel(useful_threads(threads, g.rows * g.cols * ld), ceil_div(g.rows, rows), [&](int64_t task) {
    const int64_t first = task * rows, last = least(first + rows, g.rows);
    float* block = block_scratch(0, rows * ld);
    run.product(g, b, first, last, 0, panels, block, ld, kernel_scratch());
    // a whole row of z passes through the scratch, and may be longer than the kernels' own
    run.combine(z, block, ld, members, first, last, u + first * directions, block_scratch(1, ld));
  });
  packed_store().trim();
}

}  // namespace gsf
