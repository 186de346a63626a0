// Ghost dot product with K dense directions: position terms, without the [tokens, d_out] product in memory.
//
// Maths    u[t, k] = sum_o g[t, o] (sum_i r[k, o, i] a[t, i])
// Blocks   one for a tile of tokens, 64 outputs, one direction and a slice of i; it leaves parts[slice, o / 64, t, k],
//          which a second kernel adds in order: blocks for the whole device, short sums, no atomics, the same bits
// Traffic  a: K d_out / 64 reads, r: tokens / kM reads, both mostly from the second-level cache (blocks run in groups
//          of eight token tiles); g: K slices reads; parts: 4 K slices tokens d_out / 64 bytes written and read
// Budget   registers: MmaTile 240, FmaTile 128, sum_parts 64; no spills
#pragma once

#include "common/epilogue.cuh"
#include "common/tile_fma.cuh"
#include "common/tile_mma.cuh"
#include "ghost_dot/ghost_dot.h"

namespace gradshield {

constexpr int kGhostDotOutputs = 64;

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) ghost_dot_kernel(GhostDotParams p) {
  static_assert(Tile::kN == kGhostDotOutputs, "parts are counted in tiles of outputs");
  static_assert(RowTile<Tile>::kSharedBytes <= 60 * 1024, "two blocks fit into the 164 KiB of 8.0");
  constexpr int64_t kGroup = 8;
  const int64_t tiles_t = ceil_div(p.tokens, Tile::kM), tiles_o = ceil_div(p.d_out, Tile::kN);
  const int64_t first = blockIdx.x / (kGroup * tiles_o) * kGroup, in_group = blockIdx.x % (kGroup * tiles_o);
  const int64_t height = tiles_t - first < kGroup ? tiles_t - first : kGroup;
  const int64_t t0 = (first + in_group % height) * Tile::kM, i_o = in_group / height, o0 = i_o * Tile::kN;
  const int64_t k = blockIdx.y;

  char* shared = dynamic_shared();
  const Operand a = operand(p.a, p.dtype_a, p.tokens, p.stride_a_t, p.stride_a_i);
  const char* r_k = static_cast<const char*>(p.r) + k * p.stride_r_k * item_bytes(p.dtype_r);
  const Operand r = operand(r_k, p.dtype_r, p.d_out, p.stride_r_o, p.stride_r_i);
  float sums[Tile::kValues];
  const Slice i = slice_of(p.d_in, p.slices, blockIdx.z);
  Tile::product(shared, a, r, t0, o0, i.begin, i.end, sums);

  float* rows = reinterpret_cast<float*>(shared);
  RowTile<Tile>::put(rows, sums);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* out = p.slices * tiles_o == 1 ? p.u : p.parts + (blockIdx.z * tiles_o + i_o) * p.tokens * p.directions;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < Tile::kM && t0 + row < p.tokens;
       row += Tile::kThreads / 32) {
    float u = 0.0f;
    for (int n = lane; n < Tile::kN && o0 + n < p.d_out; n += 32)
      u = fmaf(load_as_float(p.g, p.dtype_g, (t0 + row) * p.stride_g_t + (o0 + n) * p.stride_g_o),
               load_shared(rows + row * RowTile<Tile>::kPitch + n), u);
    u = warp_sum(u);
    if (lane == 0) store_global(out + (t0 + row) * p.directions + k, u);
  }
}

template <class Tile>
cudaError_t launch_ghost_dot(const GhostDotParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.tokens, Tile::kM) * ceil_div(p.d_out, Tile::kN);
  if (blocks > 0x7fffffff || p.directions > 65535 || p.slices < 1 || p.slices > 65535) return cudaErrorInvalidValue;
  return launch(
      "ghost_dot", ghost_dot_kernel<Tile>,
      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.directions), static_cast<unsigned>(p.slices)),
      Tile::kThreads, RowTile<Tile>::kSharedBytes, stream, p);
}

template <class TA, class TR>
cudaError_t launch_ghost_dot_mma(const GhostDotParams& p, cudaStream_t stream) {
  const bool vectors = takes_vectors(operand(p.a, p.dtype_a, p.tokens, p.stride_a_t, p.stride_a_i)) &&
                       takes_vectors(operand(p.r, p.dtype_r, p.d_out, p.stride_r_o, p.stride_r_i)) &&
                       p.stride_r_k * item_bytes(p.dtype_r) % 16 == 0;
  // where the activation is split as well, its terms take the registers of half the rows
  constexpr int kM = MmaTile<TA, TR, 128, kGhostDotOutputs, true, true>::kTermsA == 1 ? 128 : 64;
  return vectors ? launch_ghost_dot<MmaTile<TA, TR, kM, kGhostDotOutputs, true, true>>(p, stream)
                 : launch_ghost_dot<MmaTile<TA, TR, kM, kGhostDotOutputs, false, false>>(p, stream);
}

template <class TA>
cudaError_t launch_ghost_dot_mma(const GhostDotParams& p, cudaStream_t stream) {
  if (p.dtype_r == kFloat32) return launch_ghost_dot_mma<TA, float>(p, stream);
  if (p.dtype_r == kBfloat16) return launch_ghost_dot_mma<TA, Bf16>(p, stream);
  return launch_ghost_dot_mma<TA, Half>(p, stream);
}

cudaError_t ghost_dot(const GhostDotParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.directions == 0) return cudaSuccess;
  const cudaError_t error = p.dtype_a == kFloat32   ? launch_ghost_dot<FmaTile<64, kGhostDotOutputs>>(p, stream)
                            : p.dtype_a == kFloat16 ? launch_ghost_dot_mma<Half>(p, stream)
                                                    : launch_ghost_dot_mma<Bf16>(p, stream);
  const int64_t parts = p.slices * ceil_div(p.d_out, kGhostDotOutputs);
  if (error != cudaSuccess || parts == 1) return error;
  return sum_parts({p.parts, p.u, parts, p.tokens * p.directions}, stream);
}

}  // namespace gradshield
