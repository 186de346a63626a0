// The table of kernels that each instruction set fills; drivers in csrc/<op>/cpu.cpp see nothing else of them.
#pragma once

#include <cstdint>

#include "common/matrix.h"

namespace gsf {

constexpr int64_t kPanel = 16;  // columns of the right factor that are multiplied side by side

// The right factor B [depth, cols] of a product, in panels of 16 columns: panel j is [depth][16], zero-padded.
// `panels` may be null: then the kernel packs the part of B that it is at, from `source`.
// `split` is for products of bfloat16 pairs: each column times 2^scale, as one or three bfloat16 panels that sum to it
// exactly.
struct Packed {
  Matrix source;          // [depth, cols]
  const float* panels;    // [ceil(cols / 16)][depth][16]
  const uint16_t* split;  // [ceil(cols / 16)][ceil(depth / 32)][splits][16 pairs of depth][16 columns][2]
  const float* unscale;   // [ceil(cols / 16) * 16], 2^-scale of each column
  int splits;             // 1 or 3
};

// Which columns of a low-rank direction belong to which of K directions, in rows of whole panels.
struct Members {
  const float* of;              // [directions][ceil(ranks / 16) * 16], zero-padded
  const int64_t *begin, *end;   // [directions]: the panels outside which a direction's row is zero
  int64_t directions, columns;  // columns: of a row, a multiple of 16
};

struct Kernels {
  const char* name;
  int64_t row_block;  // rows of a register block of the float32 product: a multiple of it leaves none idle
  int parts;  // bfloat16 parts of a number that its products take: 3 whatever the dtypes, 1 for bfloat16 alone, 0 none

  // out[t - first, c] = sum_k x[t, k] B[k, c] for t in [first, last) and the columns c of panels [panel, panel_end);
  // `out` has rows of ld floats, is fully written (padding columns with zeros) and is zeroed for depth 0.
  void (*product)(const Matrix& x, const Packed& b, int64_t first, int64_t last, int64_t panel, int64_t panel_end,
                  float* out, int64_t ld, float* scratch);

  // Panels [panel, panel_end) of B as float32 into `panels`, laid out as in Packed.
  void (*pack)(const Matrix& b, int64_t panel, int64_t panel_end, float* panels);

  // Panels [panel, panel_end) as bfloat16 parts; false where that would not be exact (a NaN, an infinity, a column
  // whose magnitudes are too far apart). Null where `parts` is 0.
  bool (*split)(const Matrix& b, int64_t panel, int64_t panel_end, int splits, uint16_t* split, float* unscale);

  // u[t - first, k] = sum_j member.of[k, j] z[t, j] w[t - first, j], over the panels of direction k
  void (*combine)(const Matrix& z, const float* w, int64_t ld, const Members& member, int64_t first, int64_t last,
                  float* u, float* scratch);

  // u[t - first] += sum_c z[t, column + c] w[t - first, c] for c < width
  void (*row_dots)(const Matrix& z, int64_t column, int64_t width, const float* w, int64_t ld, int64_t first,
                   int64_t last, float* u, int64_t u_stride, float* scratch);

  // x[row] . y[other] over all columns
  float (*dot)(const Matrix& x, int64_t row, const Matrix& y, int64_t other, float* scratch);

  // u[k] = sum_c g[row, c] x[row, c] r[k, c] for every row k of r; x may be null, for x = 1
  void (*scale_dots)(const Matrix* x, const Matrix& g, int64_t row, const Matrix& r, float* u, float* scratch);

  // out[i, j] = sum_{t < tokens} left[t, i] right[t, j] for i in [first, last); rows of `right` are padded to panels
  void (*outer)(const float* left, int64_t left_ld, const float* right, int64_t right_ld, int64_t tokens, int64_t first,
                int64_t last, int64_t cols, float* out, int64_t out_ld);

  // block[t - first, u - column] = x[t] . x[u] for t in [first, last) and u in [column, column + width), u <= t, of a
  // bfloat16 x whose columns lie side by side; what else is in the block may be anything. Numbers and sums below 2^-126
  // count as zero. `ld` and the block's rows are multiples of 4. Null where no instruction does it better than product.
  void (*gram)(const Matrix& x, int64_t first, int64_t last, int64_t column, int64_t width, float* block,
               int64_t ld) = nullptr;
};

constexpr int64_t kScratchFloats = 16384;  // what `scratch` must hold

extern const Kernels kPortable;
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
extern const Kernels kAmx;

}  // namespace gsf
