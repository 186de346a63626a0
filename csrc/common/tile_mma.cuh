// A tile of C = A B^T on tensor cores, exact enough for float32 promises.
//
// Maths    C[m, n] = sum_k A[m, k] B[n, k];  A float16 or bfloat16, B float32, float16 or bfloat16
// Terms    Where both are bfloat16, or both float16, products are exact as they are. Otherwise each operand is split
//          into bfloat16 terms (types.cuh) and every pair of terms is multiplied, smallest first.
// Sums     A matrix instruction may cut rather than round, and cuts do not average out. So a chain of instructions
//          spans one step of kK = 32 only; the steps add up in float32, rounded to nearest.
// Splits   B is split in registers, once for the kWarpM rows that use it: a split copy in memory would be 6 bytes an
//          element to write and to read again where float32 has 4.
// Traffic  a block reads kM rows of A and kN rows of B once; kStages steps are in flight through cp.async.
#pragma once

#include "common/operand.cuh"

namespace gradshield {

template <class TA_, class TB_, int kM_, int kN_, bool kVectorA_, bool kVectorB_>
struct MmaTile {
  using TA = TA_;
  using TB = TB_;
  static constexpr int kM = kM_, kN = kN_, kK = 32, kStages = 3;
  static constexpr bool kVectorA = kVectorA_, kVectorB = kVectorB_;
  static constexpr int kThreads = 128;                       // 2 x 2 warps
  static constexpr int kBlocks = kM * kN > 64 * 32 ? 2 : 3;  // on a multiprocessor, as registers allow
  static constexpr int kWarpM = kM / 2, kWarpN = kN / 2, kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static constexpr int kValues = kTilesM * kTilesN * 4;  // of C, for each thread

  static constexpr bool kNative = sizeof(TB) == 2 && DtypeOf<TA>::value == DtypeOf<TB>::value;
  static constexpr bool kBfloat = !kNative || DtypeOf<TA>::value == kBfloat16;
  static constexpr int kTermsA = kNative ? 1 : Bf16Terms<TA>::value, kTermsB = kNative ? 1 : Bf16Terms<TB>::value;

  // Rows are 80 or 160 bytes apart, so that the eight rows of a matrix load, and the float pairs of four rows, fall
  // into different banks.
  static constexpr int kPitch = kK + 8;
  static constexpr int kBytesA = kM * kPitch * sizeof(TA), kBytesB = kN * kPitch * sizeof(TB);
  static constexpr int kSharedBytes = kStages * (kBytesA + kBytesB);

  static_assert(sizeof(TA) == 2, "the tensor cores take 16-bit activations; float32 has FmaTile");
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "warps hold whole 16x16 pieces of A and pairs of 8 columns");
  static_assert(kBytesA % 16 == 0 && kBytesB % 16 == 0, "stages stay aligned to 16 bytes");

  // Where value i of this thread stands in the tile.
  static __device__ __forceinline__ int row_of(int i) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    return warp / 2 * kWarpM + i / (4 * kTilesN) * 16 + lane / 4 + i % 4 / 2 * 8;
  }
  static __device__ __forceinline__ int column_of(int i) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    return warp % 2 * kWarpN + i / 4 % kTilesN * 8 + lane % 4 * 2 + i % 2;
  }

  // B's pieces of columns 8 j .. 8 j + 15 of the warp, as terms: b[term][0 or 1][register].
  static __device__ __forceinline__ void load_b(uint32_t (&b)[kTermsB][2][2], const TB* tile, int column, int k) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (sizeof(TB) == 2) {
      uint32_t raw[4];
      load_matrices(raw, tile + (column + lane / 16 * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kTermsB == 1) {
          b[0][i / 2][i % 2] = raw[i];
        } else {
          split_halves(b, i / 2, i % 2, raw[i]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto* p = reinterpret_cast<const float2*>(tile + (column + i / 2 * 8 + lane / 4) * kPitch + k +
                                                        lane % 4 * 2 + i % 2 * 8);
        const float2 pair = load_shared(p);
        uint32_t terms[kTermsB];
        split_pair(pair.x, pair.y, terms);
#pragma unroll
        for (int s = 0; s < kTermsB; ++s) b[s][i / 2][i % 2] = terms[s];
      }
    }
  }

  template <int kTerms>
  static __device__ __forceinline__ void split_halves(uint32_t (&b)[kTerms][2][2], int column, int half, uint32_t raw) {
    uint32_t terms[kTerms];
    split_pair(half_bits_to_float(static_cast<uint16_t>(raw)), half_bits_to_float(static_cast<uint16_t>(raw >> 16)),
               terms);
#pragma unroll
    for (int s = 0; s < kTerms; ++s) b[s][column][half] = terms[s];
  }

  static __device__ __forceinline__ void multiply_step(const TA* tile_a, const TB* tile_b, float (&sums)[kValues]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    float chain[kValues / 4][4] = {};
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      uint32_t a[kTermsA][kTilesM][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        uint32_t raw[4];
        load_matrices(raw, tile_a + (warp / 2 * kWarpM + m * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (kTermsA == 1) {
            a[0][m][i] = raw[i];
          } else {
            uint32_t terms[kTermsA];
            split_pair(half_bits_to_float(static_cast<uint16_t>(raw[i])),
                       half_bits_to_float(static_cast<uint16_t>(raw[i] >> 16)), terms);
#pragma unroll
            for (int s = 0; s < kTermsA; ++s) a[s][m][i] = terms[s];
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        uint32_t b[kTermsB][2][2];
        load_b(b, tile_b, warp % 2 * kWarpN + n * 8, k);
#pragma unroll
        for (int order = kTermsA + kTermsB - 2; order >= 0; --order)
#pragma unroll
          for (int s = kTermsA - 1; s >= 0; --s)
            if (order - s >= 0 && order - s < kTermsB)
#pragma unroll
              for (int m = 0; m < kTilesM; ++m)
#pragma unroll
                for (int j = 0; j < 2; ++j)
                  multiply_16x8x16<kBfloat>(chain[m * kTilesN + n + j], a[s][m], b[order - s][j],
                                            k == 0 && order == kTermsA + kTermsB - 2);
      }
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i] += chain[i / 4][i % 4];
  }

  static __device__ __forceinline__ void stage_step(char* slot, const Operand& a, const Operand& b, int64_t row_a,
                                                    int64_t row_b, int64_t k, int64_t k_end) {
    stage<TA, kM, kK, kPitch, kThreads, kVectorA>(reinterpret_cast<TA*>(slot), a, row_a, k, k_end);
    stage<TB, kN, kK, kPitch, kThreads, kVectorB>(reinterpret_cast<TB*>(slot + kBytesA), b, row_b, k, k_end);
  }

  // sums = the thread's values of A[row_a : row_a + kM, k_begin : k_end] B[row_b : row_b + kN, k_begin : k_end]^T.
  // k_begin is a multiple of kK, or the operands are not read in vectors. Ends with a barrier: `shared` is free again.
  static __device__ __forceinline__ void product(char* shared, const Operand& a, const Operand& b, int64_t row_a,
                                                 int64_t row_b, int64_t k_begin, int64_t k_end,
                                                 float (&sums)[kValues]) {
    constexpr int kSlot = kBytesA + kBytesB;
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i] = 0.0f;
    const int64_t steps = k_end > k_begin ? ceil_div(k_end - k_begin, kK) : 0;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) stage_step(shared + s * kSlot, a, b, row_a, row_b, k_begin + s * kK, k_end);
      copy_async_commit();
    }
    int slot = 0, free_slot = kStages - 1;
    for (int64_t step = 0; step < steps; ++step) {
      copy_async_wait<kStages - 2>();
      // one barrier a step: it shows this step's copies to all, and the slot filled below was read a step ago
      sync_block();
      const int64_t ahead = step + kStages - 1;
      if (ahead < steps) stage_step(shared + free_slot * kSlot, a, b, row_a, row_b, k_begin + ahead * kK, k_end);
      copy_async_commit();
      const char* at = shared + slot * kSlot;
      multiply_step(reinterpret_cast<const TA*>(at), reinterpret_cast<const TB*>(at + kBytesA), sums);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      free_slot = free_slot + 1 == kStages ? 0 : free_slot + 1;
    }
    copy_async_wait<0>();
    sync_block();
  }
};

}  // namespace gradshield
