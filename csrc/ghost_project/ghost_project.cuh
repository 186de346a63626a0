// The second half of the two-sided projection: one small outer product for each example. The first half, both sides'
// projections of all tokens, is lowrank_project.
//
// Maths    s[n] = sum_{t in n} left[t] right[t]^T                         left = g p_out, right = a p_in, float32
// Blocks   one for an example and 32 x 32 of its outputs, walking along the example's tokens; no atomics
// Traffic  left: k_in / 32 reads, right: k_out / 32 reads, beyond the first from cache; s: one write
// Budget   registers: FmaTile 128; no spills
#pragma once

#include "common/epilogue.cuh"
#include "common/tile_fma.cuh"
#include "ghost_project/ghost_project.h"

namespace gradshield {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) outer_sum_kernel(OuterSumParams p) {
  static_assert(Tile::kSharedBytes <= 8 * 1024, "eight blocks fit on any multiprocessor from 8.0 on");
  const int64_t n = blockIdx.x, o0 = static_cast<int64_t>(blockIdx.y) * Tile::kM;
  const int64_t i0 = static_cast<int64_t>(blockIdx.z) * Tile::kN;
  // boundaries on a device are not checked by the caller: never read beyond the tokens that there are
  const int64_t start = load_global(p.cu_seqlens + n), end = load_global(p.cu_seqlens + n + 1);
  const int64_t begin = start < 0 ? 0 : start, stop = end > p.tokens ? p.tokens : end;
  float sums[Tile::kValues];
  long_product<Tile>(dynamic_shared(), operand(p.left, kFloat32, p.k_out, 1, p.k_out),
                     operand(p.right, kFloat32, p.k_in, 1, p.k_in), o0, i0, begin, stop, sums);
#pragma unroll
  for (int i = 0; i < Tile::kValues; ++i) {
    const int64_t o = o0 + Tile::row_of(i), c = i0 + Tile::column_of(i);
    if (o < p.k_out && c < p.k_in) store_global(p.out + (n * p.k_out + o) * p.k_in + c, sums[i]);
  }
}

cudaError_t outer_sum(const OuterSumParams& p, cudaStream_t stream) {
  using Tile = FmaTile<32, 32>;
  const int64_t tiles_o = ceil_div(p.k_out, Tile::kM), tiles_i = ceil_div(p.k_in, Tile::kN);
  if (p.examples > 0x7fffffff || tiles_o > 65535 || tiles_i > 65535) return cudaErrorInvalidValue;
  return launch("outer_sum", outer_sum_kernel<Tile>,
                dim3(static_cast<unsigned>(p.examples), static_cast<unsigned>(tiles_o), static_cast<unsigned>(tiles_i)),
                Tile::kThreads, Tile::kSharedBytes, stream, p);
}

}  // namespace gradshield
