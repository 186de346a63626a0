// What ghost_norm_sq asks of its caller; the kernels and their costs are in ghost_norm_sq.cuh.
#pragma once

#include "common/runtime.h"

namespace gradshield {

// x[token, column]
struct Factor {
  const void* data;
  int64_t stride_t, stride_c;  // in elements
  int32_t dtype;
};

struct GhostInnerParams {
  Factor left1, right1, left2, right2;
  int64_t left_width, right_width, tokens;
  const int64_t* cu_seqlens;  // [examples + 1], contiguous
  const int32_t* items;       // [count, 4]: example or -1, first tile, second tile, weight
  float* parts;               // [count], every element written
  int64_t count;
  bool same;  // left1 is left2 and right1 is right2
};

struct SumItemsParams {
  const float* parts;
  const int64_t* spans;  // [examples, 2]: where an example's parts start and stop
  float* out;            // [examples], every element written
  int64_t examples;
};

cudaError_t ghost_inner(const GhostInnerParams& p, bool outer, cudaStream_t stream);
cudaError_t sum_items(const SumItemsParams& p, cudaStream_t stream);

}  // namespace gradshield
