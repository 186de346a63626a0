// Around a tile product: sums that are too long for one, and rows that a warp can walk along.
#pragma once

#include "common/operand.cuh"
#include "common/reduce.cuh"

namespace gradshield {

// Terms of one sign let the rounding of a running sum drift: on the emulator, 14336 of them took 1.1 of the promised
// bound, less than 0.3 when cut at 2048. So longer sums are cut, here or by the caller's slices, and the pieces added.
constexpr int64_t kLongestSum = 2048;

// As Tile::product, over any length.
template <class Tile>
__device__ __forceinline__ void long_product(char* shared, const Operand& a, const Operand& b, int64_t row_a,
                                             int64_t row_b, int64_t k_begin, int64_t k_end,
                                             float (&totals)[Tile::kValues]) {
#pragma unroll
  for (int i = 0; i < Tile::kValues; ++i) totals[i] = 0.0f;
  for (int64_t k = k_begin; k < k_end; k += kLongestSum) {
    float sums[Tile::kValues];
    Tile::product(shared, a, b, row_a, row_b, k, k + kLongestSum < k_end ? k + kLongestSum : k_end, sums);
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) totals[i] += sums[i];
  }
}

// Eight floats beyond a row: the pairs that four rows of a warp store together fall into different banks.
template <class Tile>
struct RowTile {
  static constexpr int kPitch = Tile::kN + 8;
  static constexpr int kBytes = Tile::kM * kPitch * 4;
  static constexpr int kSharedBytes = kBytes > Tile::kSharedBytes ? kBytes : Tile::kSharedBytes;

  static __device__ __forceinline__ void put(float* rows, const float (&sums)[Tile::kValues]) {
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) store_shared(rows + Tile::row_of(i) * kPitch + Tile::column_of(i), sums[i]);
    sync_block();
  }
};

}  // namespace gradshield
