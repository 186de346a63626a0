// From the registers of a tile product to rows that a warp can walk along.
#pragma once

#include "common/reduce.cuh"

namespace gradshield {

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
