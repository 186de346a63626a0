// What the second half of ghost_project asks of its caller; the kernel and its costs are in ghost_project.cuh.
#pragma once

#include "common/runtime.h"

namespace gradshield {

struct OuterSumParams {
  const float *left, *right;  // [tokens, k_out] [tokens, k_in], contiguous
  const int64_t* cu_seqlens;  // [examples + 1], contiguous
  float* out;                 // [examples, k_out, k_in], every element written
  int64_t tokens, k_out, k_in, examples;
};

cudaError_t outer_sum(const OuterSumParams& p, cudaStream_t stream);

}  // namespace gradshield
