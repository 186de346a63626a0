#include "common/packing.h"

#include <atomic>

#include "common/pool.h"

namespace gsf {

bool wants_split(const Kernels& run, const Matrix& x, int64_t cols) {
  constexpr int64_t kWorthSplitting = 48;  // rows; below, cutting B into parts costs more than its float32 product
  constexpr int64_t kWorthCutting = 128;   // columns; below, cutting x into parts costs more than its float32 product
  if (run.parts == 0 || x.col_stride != 1 || x.rows < kWorthSplitting) return false;
  return x.dtype == DType::kBFloat16 || (run.parts == 3 && cols >= kWorthCutting);
}

Packed pack(const Kernels& run, const Matrix& b, bool try_split, int threads, Buffer& store) {
  const int64_t panels = ceil_div(b.cols, kPanel);
  Packed out{b, nullptr, nullptr, nullptr, b.dtype == DType::kBFloat16 ? 1 : 3};
  threads = useful_threads(threads, b.rows * b.cols * 8);
  if (try_split && out.splits <= run.parts) {
    const int64_t halves = panels * out.splits * ceil_div(b.rows, 32) * 512;
    uint16_t* split = store.get<uint16_t>(halves + 2 * panels * kPanel);
    float* unscale = reinterpret_cast<float*>(split + halves);
    std::atomic<bool> exact{true};
    parallel(threads, panels, [&](int64_t j) {
      if (exact.load() && !run.split(b, j, j + 1, out.splits, split, unscale)) exact.store(false);
    });
    if (exact.load()) {
      out.split = split;
      out.unscale = unscale;
      return out;
    }
  }
  float* to = store.get<float>(panels * kPanel * b.rows);
  parallel(threads, panels, [&](int64_t j) { run.pack(b, j, j + 1, to); });
  out.panels = to;
  return out;
}

int useful_threads(int threads, int64_t multiply_adds) {
  constexpr int64_t kWorthWaking = 1 << 22;           // tens of microseconds of work, what waking threads costs
  return multiply_adds < kWorthWaking ? 1 : threads;  // all or none: OpenMP ends threads that a smaller team leaves out
}

int64_t task_rows(const Kernels& run, const Packed& b, int64_t tokens) {
  const int64_t rows = b.split != nullptr ? 64 : 4 * run.row_block;
  return tokens >= 2048 ? 2 * rows : rows;
}

}  // namespace gsf
