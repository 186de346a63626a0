// The two halves of the low-rank ghost dot product: thin matrix products that live from reading a, or g, once.
//
// Maths    z[t, j] = sum_i a[t, i] q[i, j]
//          u[t, k] = sum_j z[t, j] member[j, k] (sum_o g[t, o] p[o, j])
// Blocks   one for 64 tokens, 32 ranks and a slice of the summed axis; slices leave parts that a second kernel adds in
//          order. Few tokens leave most of a device idle without slices, and reading is all that this op does.
// Traffic  a (or g): ranks / 32 reads, beyond the first from cache; q (or p): tokens / 64 reads from cache;
//          parts: 4 slices tokens ranks bytes (contract: 4 slices ranks / 32 tokens directions) written and read
// Budget   registers: MmaTile 168, FmaTile 128, sum_parts 64; no spills
#pragma once

#include "common/epilogue.cuh"
#include "common/tile_fma.cuh"
#include "common/tile_mma.cuh"
#include "ghost_dot_lowrank/ghost_dot_lowrank.h"

namespace gradshield {

constexpr int kLowrankTokens = 64, kLowrankRanks = 32;

// The block's place: tokens t0 .., ranks j0 .., slice [begin, end) of the summed axis in whole steps of 32.
struct LowrankPlace {
  int64_t t0, i_j, j0, begin, end;
};

__device__ __forceinline__ LowrankPlace lowrank_place(const ProjectParams& p) {
  const int64_t tiles_j = ceil_div(p.ranks, kLowrankRanks), i_j = blockIdx.x % tiles_j;
  const Slice i = slice_of(p.width, p.slices, blockIdx.y);
  return {blockIdx.x / tiles_j * kLowrankTokens, i_j, i_j * kLowrankRanks, i.begin, i.end};
}

template <class Tile>
__device__ __forceinline__ void lowrank_product(const ProjectParams& p, const LowrankPlace& at,
                                                float (&sums)[Tile::kValues]) {
  static_assert(Tile::kM == kLowrankTokens && Tile::kN == kLowrankRanks, "places are counted in these tiles");
  static_assert(RowTile<Tile>::kSharedBytes <= 30 * 1024, "three blocks fit on any multiprocessor from 8.0 on");
  Tile::product(dynamic_shared(), operand(p.x, p.dtype_x, p.tokens, p.stride_x_t, p.stride_x_i),
                operand(p.w, kFloat32, p.ranks, p.stride_w_j, p.stride_w_i), at.t0, at.j0, at.begin, at.end, sums);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) lowrank_project_kernel(ProjectParams p) {
  const LowrankPlace at = lowrank_place(p);
  float sums[Tile::kValues];
  lowrank_product<Tile>(p, at, sums);
  float* out = p.slices == 1 ? p.z : p.parts + blockIdx.y * p.tokens * p.ranks;
#pragma unroll
  for (int i = 0; i < Tile::kValues; ++i) {
    const int64_t t = at.t0 + Tile::row_of(i), j = at.j0 + Tile::column_of(i);
    if (t < p.tokens && j < p.ranks) store_global(out + t * p.ranks + j, sums[i]);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) lowrank_contract_kernel(ContractParams p) {
  const ProjectParams& q = p.product;
  const LowrankPlace at = lowrank_place(q);
  float sums[Tile::kValues];
  lowrank_product<Tile>(q, at, sums);
  float* rows = reinterpret_cast<float*>(dynamic_shared());
  RowTile<Tile>::put(rows, sums);

  const int64_t tiles_j = ceil_div(q.ranks, kLowrankRanks), parts = q.slices * tiles_j;
  float* out = parts == 1 ? p.u : p.parts + (blockIdx.y * tiles_j + at.i_j) * q.tokens * p.directions;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t j = at.j0 + lane;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < Tile::kM && at.t0 + row < q.tokens;
       row += Tile::kThreads / 32) {
    const int64_t t = at.t0 + row;
    const float term = j < q.ranks ? load_global(p.z + t * p.stride_z_t + j * p.stride_z_j) *
                                         load_shared(rows + row * RowTile<Tile>::kPitch + lane)
                                   : 0.0f;
    for (int64_t k = 0; k < p.directions; ++k) {
      const float share = j < q.ranks ? load_global(p.member + j * p.stride_member_j + k * p.stride_member_k) : 0.0f;
      const float u = warp_sum(term * share);
      if (lane == 0) store_global(out + t * p.directions + k, u);
    }
  }
}

// Calls launcher.operator()<Tile>() with the tile for x's dtype and strides.
template <class Launcher>
cudaError_t with_lowrank_tile(const ProjectParams& p, const Launcher& launcher) {
  const bool vectors = takes_vectors(operand(p.x, p.dtype_x, p.tokens, p.stride_x_t, p.stride_x_i)) &&
                       takes_vectors(operand(p.w, kFloat32, p.ranks, p.stride_w_j, p.stride_w_i));
  constexpr int kT = kLowrankTokens, kR = kLowrankRanks;
  if (p.dtype_x == kFloat32) return launcher(FmaTile<kT, kR>());
  if (p.dtype_x == kFloat16)
    return vectors ? launcher(MmaTile<Half, float, kT, kR, true, true>())
                   : launcher(MmaTile<Half, float, kT, kR, false, false>());
  return vectors ? launcher(MmaTile<Bf16, float, kT, kR, true, true>())
                 : launcher(MmaTile<Bf16, float, kT, kR, false, false>());
}

inline bool lowrank_grid(const ProjectParams& p, dim3* grid) {
  const int64_t blocks = ceil_div(p.tokens, kLowrankTokens) * ceil_div(p.ranks, kLowrankRanks);
  *grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.slices));
  return blocks <= 0x7fffffff && p.slices >= 1 && p.slices <= 65535;
}

cudaError_t lowrank_project(const ProjectParams& p, cudaStream_t stream) {
  dim3 grid;
  if (!lowrank_grid(p, &grid)) return cudaErrorInvalidValue;
  if (p.tokens == 0 || p.ranks == 0) return cudaSuccess;
  const cudaError_t error = with_lowrank_tile(p, [&](auto tile) {
    using Tile = decltype(tile);
    return launch("lowrank_project", lowrank_project_kernel<Tile>, grid, Tile::kThreads, Tile::kSharedBytes, stream, p);
  });
  if (error != cudaSuccess || p.slices == 1) return error;
  return sum_parts({p.parts, p.z, p.slices, p.tokens * p.ranks}, stream);
}

cudaError_t lowrank_contract(const ContractParams& p, cudaStream_t stream) {
  const ProjectParams& q = p.product;
  dim3 grid;
  if (!lowrank_grid(q, &grid)) return cudaErrorInvalidValue;
  if (q.tokens == 0 || p.directions == 0) return cudaSuccess;
  const cudaError_t error = with_lowrank_tile(q, [&](auto tile) {
    using Tile = decltype(tile);
    return launch("lowrank_contract", lowrank_contract_kernel<Tile>, grid, Tile::kThreads, RowTile<Tile>::kSharedBytes,
                  stream, p);
  });
  const int64_t parts = q.slices * ceil_div(q.ranks, kLowrankRanks);
  if (error != cudaSuccess || parts == 1) return error;
  return sum_parts({p.parts, p.u, parts, q.tokens * p.directions}, stream);
}

}  // namespace gradshield
