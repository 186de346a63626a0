// Inner products of per-example gradients given as factors, a 64 x 64 tile of products at a time.
//
// Maths    s[n] = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u])                 form "tokens"
//               = sum_{o, i} (sum_{t in n} left1[t, o] right1[t, i]) (the same of left2, right2)  form "outer"
// Blocks   the caller lists the tiles of every example in the form that is cheaper for it; one block for each: the two
//          matrices of products of its tile stay in registers, their elementwise product leaves as one number. The list
//          is made on the device and is as long as the host can bound it: example -1 is a place that stays empty
// Traffic  form "tokens": for each tile 64 tokens of all four factors; form "outer": for each tile 64 columns of both
//          sides; items: 16 bytes a tile; parts: 4 bytes a tile; a second kernel adds an example's parts in order
// Budget   registers: MmaTile 224, FmaTile 128, sum_items 64; no spills
#pragma once

#include "common/epilogue.cuh"
#include "common/tile_fma.cuh"
#include "common/tile_mma.cuh"
#include "ghost_norm_sq/ghost_norm_sq.h"

namespace gradshield {

constexpr int kInnerTile = 64;

__device__ __forceinline__ Operand tokens_as_rows(const Factor& x, int64_t end) {
  return operand(x.data, x.dtype, end, x.stride_t, x.stride_c);
}
__device__ __forceinline__ Operand columns_as_rows(const Factor& x, int64_t width) {
  return operand(x.data, x.dtype, width, x.stride_c, x.stride_t);
}

template <class Tile, bool kOuter>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) ghost_inner_kernel(GhostInnerParams p) {
  static_assert(Tile::kM == kInnerTile && Tile::kN == kInnerTile, "items are counted in these tiles");
  static_assert(Tile::kSharedBytes <= 30 * 1024, "three blocks fit on any multiprocessor from 8.0 on");
  const int32_t* item = p.items + static_cast<int64_t>(blockIdx.x) * 4;
  const int64_t n = load_global(item), first = load_global(item + 1), second = load_global(item + 2);
  if (n < 0) {
    if (threadIdx.x == 0) store_global(p.parts + blockIdx.x, 0.0f);
    return;
  }
  const float weight = static_cast<float>(load_global(item + 3));
  const int64_t start = load_global(p.cu_seqlens + n), end = load_global(p.cu_seqlens + n + 1);
  char* shared = dynamic_shared();
  float x[Tile::kValues], y[Tile::kValues];
  if constexpr (kOuter) {
    const int64_t o0 = first * kInnerTile, i0 = second * kInnerTile;
    long_product<Tile>(shared, columns_as_rows(p.left1, p.left_width), columns_as_rows(p.right1, p.right_width), o0, i0,
                       start, end, x);
    if (p.same) {
#pragma unroll
      for (int i = 0; i < Tile::kValues; ++i) y[i] = x[i];
    } else {
      long_product<Tile>(shared, columns_as_rows(p.left2, p.left_width), columns_as_rows(p.right2, p.right_width), o0,
                         i0, start, end, y);
    }
  } else {
    const int64_t t0 = start + first * kInnerTile, u0 = start + second * kInnerTile;
    long_product<Tile>(shared, tokens_as_rows(p.left1, end), tokens_as_rows(p.left2, end), t0, u0, 0, p.left_width, x);
    long_product<Tile>(shared, tokens_as_rows(p.right1, end), tokens_as_rows(p.right2, end), t0, u0, 0, p.right_width,
                       y);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Tile::kValues; ++i) sum = fmaf(x[i], y[i], sum);
  sum = warp_sum(sum);
  float* warps = reinterpret_cast<float*>(shared);
  if (threadIdx.x % 32 == 0) store_shared(warps + threadIdx.x / 32, sum);
  sync_block();
  if (threadIdx.x == 0) {
    sum = 0.0f;
    for (int w = 0; w < Tile::kThreads / 32; ++w) sum += load_shared(warps + w);
    store_global(p.parts + blockIdx.x, weight * sum);
  }
}

// Maths    out[n] = sum of the parts of n, in float64: lane l adds parts l, l + 32, ..., then the lanes add up
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_items_kernel(SumItemsParams p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (n >= p.examples) return;
  const int64_t stop = load_global(p.spans + 2 * n + 1);
  double sum = 0.0;
  for (int64_t i = load_global(p.spans + 2 * n) + threadIdx.x % 32; i < stop; i += 32)
    sum += static_cast<double>(load_global(p.parts + i));
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) store_global(p.out + n, static_cast<float>(sum));
}

template <class Tile, bool kOuter>
cudaError_t launch_ghost_inner(const GhostInnerParams& p, cudaStream_t stream) {
  if (p.count > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(kOuter ? "ghost_inner outer" : "ghost_inner tokens", ghost_inner_kernel<Tile, kOuter>,
                dim3(static_cast<unsigned>(p.count)), Tile::kThreads, Tile::kSharedBytes, stream, p);
}

template <class T>
cudaError_t launch_ghost_inner_mma(const GhostInnerParams& p, bool outer, cudaStream_t stream) {
  using Scalars = MmaTile<T, T, kInnerTile, kInnerTile, false, false>;
  if (outer) return launch_ghost_inner<Scalars, true>(p, stream);
  bool vectors = true;
  for (const Factor* x : {&p.left1, &p.right1, &p.left2, &p.right2})
    vectors = vectors && takes_vectors(operand(x->data, x->dtype, p.tokens, x->stride_t, x->stride_c));
  return vectors ? launch_ghost_inner<MmaTile<T, T, kInnerTile, kInnerTile, true, true>, false>(p, stream)
                 : launch_ghost_inner<Scalars, false>(p, stream);
}

// Tensor cores where all four factors are float16, or all bfloat16: their products are exact.
cudaError_t ghost_inner(const GhostInnerParams& p, bool outer, cudaStream_t stream) {
  bool alike = true;
  for (const Factor* x : {&p.right1, &p.left2, &p.right2}) alike = alike && x->dtype == p.left1.dtype;
  if (alike && p.left1.dtype == kBfloat16) return launch_ghost_inner_mma<Bf16>(p, outer, stream);
  if (alike && p.left1.dtype == kFloat16) return launch_ghost_inner_mma<Half>(p, outer, stream);
  using Tile = FmaTile<kInnerTile, kInnerTile>;
  return outer ? launch_ghost_inner<Tile, true>(p, stream) : launch_ghost_inner<Tile, false>(p, stream);
}

cudaError_t sum_items(const SumItemsParams& p, cudaStream_t stream) {
  return launch("sum_items", sum_items_kernel<128>, dim3(static_cast<unsigned>(ceil_div(p.examples, 4))), 128, 0,
                stream, p);
}

}  // namespace gradshield
