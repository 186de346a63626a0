// What embedding_dot asks of its caller; the kernel and its costs are in embedding_dot.cuh.
#pragma once

#include "common/runtime.h"

namespace gradshield {

struct EmbeddingDotParams {
  const int64_t* ids;  // [tokens]
  const void *g, *r;   // [tokens, width] [directions, vocabulary, width]
  float* u;            // [tokens, directions], every element written
  int64_t tokens, width, vocabulary, directions;
  int64_t stride_ids, stride_g_t, stride_g_i, stride_r_k, stride_r_v, stride_r_i;  // in elements
  int32_t dtype_g, dtype_r;
};

cudaError_t embedding_dot(const EmbeddingDotParams& p, cudaStream_t stream);

}  // namespace gradshield
