// What ghost_dot asks of its caller; the kernel and its costs are in ghost_dot.cuh.
#pragma once

#include "common/runtime.h"

namespace gradshield {

struct GhostDotParams {
  const void *a, *g, *r;  // [tokens, d_in] [tokens, d_out] [directions, d_out, d_in]
  float *parts, *u;       // [slices * ceil(d_out / 64), tokens, directions] [tokens, directions], every element written
  int64_t tokens, d_in, d_out, directions, slices;
  int64_t stride_a_t, stride_a_i, stride_g_t, stride_g_o, stride_r_k, stride_r_o, stride_r_i;  // in elements
  int32_t dtype_a, dtype_g, dtype_r;
};

cudaError_t ghost_dot(const GhostDotParams& p, cudaStream_t stream);

}  // namespace gradshield
