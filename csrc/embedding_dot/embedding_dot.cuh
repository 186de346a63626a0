// Ghost dot product of an embedding table: one gathered row of r against one row of g.
//
// Maths    u[t, k] = g[t] . r[k, ids[t]]; NaN where ids[t] is no row of the table, which is then not read
// Blocks   a warp for each token; its lanes take four neighbours at a time, so that 16 or 8 bytes move at once
// Traffic  g: once from memory, directions - 1 times from cache; r: one row for each token and direction
// Budget   registers: embedding_dot 72; no spills, no shared memory
#pragma once

#include "common/operand.cuh"
#include "common/reduce.cuh"
#include "embedding_dot/embedding_dot.h"

namespace gradshield {

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

template <class TG, class TR, bool kVector>
__global__ void __launch_bounds__(256) embedding_dot_kernel(EmbeddingDotParams p) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (t >= p.tokens) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t id = load_global(p.ids + t * p.stride_ids);
  const bool known = id >= 0 && id < p.vocabulary;
  const TG* g = static_cast<const TG*>(p.g) + t * p.stride_g_t;
  for (int64_t k = 0; k < p.directions; ++k) {
    const TR* r = static_cast<const TR*>(p.r) + k * p.stride_r_k + (known ? id : 0) * p.stride_r_v;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int64_t whole = !known ? 0 : kVector ? p.width / 4 * 4 : 0;
    if constexpr (kVector) {
      for (int64_t i = lane * 4; i < whole; i += 128) {
        const auto x = load_global(reinterpret_cast<const Four<TG>*>(g + i));
        const auto y = load_global(reinterpret_cast<const Four<TR>*>(r + i));
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[c] = fmaf(to_float(x.x[c]), to_float(y.x[c]), sums[c]);
      }
    }
    for (int64_t i = whole + lane; known && i < p.width; i += 32)
      sums[0] = fmaf(to_float(load_global(g + i * p.stride_g_i)), to_float(load_global(r + i * p.stride_r_i)), sums[0]);
    const float u = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (lane == 0) store_global(p.u + t * p.directions + k, known ? u : bits_float(0x7fc00000u));
  }
}

template <class TG, class TR>
cudaError_t launch_embedding_dot(const EmbeddingDotParams& p, cudaStream_t stream) {
  const auto fours = [](const void* data, size_t item, int64_t stride_i, int64_t stride_row, int64_t stride_k) {
    return stride_i == 1 && reinterpret_cast<uintptr_t>(data) % (4 * item) == 0 && stride_row % 4 == 0 &&
           stride_k % 4 == 0;
  };
  const bool vector = fours(p.g, sizeof(TG), p.stride_g_i, p.stride_g_t, 0) &&
                      fours(p.r, sizeof(TR), p.stride_r_i, p.stride_r_v, p.stride_r_k);
  const int64_t blocks = ceil_div(p.tokens, 8);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch("embedding_dot", vector ? embedding_dot_kernel<TG, TR, true> : embedding_dot_kernel<TG, TR, false>,
                dim3(static_cast<unsigned>(blocks)), 256, 0, stream, p);
}

template <class TG>
cudaError_t launch_embedding_dot(const EmbeddingDotParams& p, cudaStream_t stream) {
  if (p.dtype_r == kFloat32) return launch_embedding_dot<TG, float>(p, stream);
  if (p.dtype_r == kBfloat16) return launch_embedding_dot<TG, Bf16>(p, stream);
  return launch_embedding_dot<TG, Half>(p, stream);
}

cudaError_t embedding_dot(const EmbeddingDotParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.directions == 0) return cudaSuccess;
  if (p.dtype_g == kFloat32) return launch_embedding_dot<float>(p, stream);
  if (p.dtype_g == kBfloat16) return launch_embedding_dot<Bf16>(p, stream);
  return launch_embedding_dot<Half>(p, stream);
}

}  // namespace gradshield
