// Sums in a fixed order: across the lanes of a warp, across a block, across parts that blocks left in memory.
#pragma once

#include "common/types.cuh"

namespace gradshield {

// Every lane gets the sum, the same bits in each: a butterfly adds the same pairs whichever lane looks.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

struct SumPartsParams {
  const float* parts;  // [count, size]
  float* out;          // [size], every element written
  int64_t count, size;
};

// Maths    out[i] = sum_c parts[c, i], in float64 and in the order of c
// Traffic  4 (count + 1) size bytes, neighbours by neighbours
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(SumPartsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.size) return;
  double sum = 0.0;
  for (int64_t c = 0; c < p.count; ++c) sum += static_cast<double>(load_global(p.parts + c * p.size + i));
  store_global(p.out + i, static_cast<float>(sum));
}

inline cudaError_t sum_parts(const SumPartsParams& p, cudaStream_t stream) {
  return launch("sum_parts", sum_parts_kernel<256>, dim3(static_cast<unsigned>(ceil_div(p.size, 256))), 256, 0, stream,
                p);
}

}  // namespace gradshield
