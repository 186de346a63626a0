// What kernels see in the place of CUDA when g++ compiles them: the same names as the device half of
// common/platform.cuh, with every access checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::emulator::machine().thread_index())
#define blockIdx (::emulator::machine().block_index())
#define blockDim (::emulator::machine().block_size())
#define gridDim (::emulator::machine().grid_size())

using dim3 = emulator::Index3;
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

namespace gradshield {

template <class T>
T load_global(const T* p) {
  emulator::machine().read_global(p, sizeof(T));
  return *p;
}
template <class T>
void store_global(T* p, T value) {
  emulator::machine().write_global(p, sizeof(T));
  *p = value;
}
template <class T>
T load_shared(const T* p) {
  emulator::machine().read_shared(p, sizeof(T));
  return *p;
}
template <class T>
void store_shared(T* p, T value) {
  emulator::machine().write_shared(p, sizeof(T));
  *p = value;
}

inline char* dynamic_shared() {
  return emulator::machine().shared();
}

// The line tells two barriers apart: threads of a block that wait at different ones have diverged.
inline void sync_block(int line = __builtin_LINE()) {
  emulator::machine().sync_block(line);
}
inline void sync_warp(int line = __builtin_LINE()) {
  emulator::machine().sync_warp(line);
}

template <class T>
T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
  const auto* all = emulator::machine().exchange(line, &value, sizeof value);
  memcpy(&value, all[(emulator::machine().lane() ^ mask) & 31].bytes, sizeof value);
  return value;
}

inline float half_bits_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24));
}

inline void copy_async_16(void* to_shared, const void* from_global, int bytes) {
  emulator::machine().copy_async(to_shared, from_global, bytes);
}
inline void copy_async_commit() {
  emulator::machine().copy_async_commit();
}
template <int kNewestLeft>
void copy_async_wait() {
  emulator::machine().copy_async_wait(kNewestLeft);
}

inline void load_matrices(uint32_t (&out)[4], const void* row, int line = __builtin_LINE()) {
  auto& machine = emulator::machine();
  if (reinterpret_cast<uintptr_t>(row) % 16) machine.fault("ldmatrix needs rows at multiples of 16 bytes", row);
  const auto* all = machine.exchange(line, &row, sizeof row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const char* source;
    memcpy(&source, all[matrix * 8 + machine.lane() / 4].bytes, sizeof source);
    out[matrix] = load_shared(reinterpret_cast<const uint32_t*>(source) + machine.lane() % 4);
  }
}

// Products are exact in double; the sum is cut towards zero once, which is the coarsest rounding that matrix units are
// known for, so that an error bound that holds here does not lean on rounding to nearest.
inline float cut_to_float(double x) {
  const float f = static_cast<float>(x);
  return std::fabs(static_cast<double>(f)) > std::fabs(x) ? std::nextafter(f, 0.0f) : f;
}

template <bool kBfloat>
void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool first,
                      int line = __builtin_LINE()) {
  auto& machine = emulator::machine();
  // Decoded once by the lane that owns them: a at [register][half], then b.
  float mine[12];
  for (int i = 0; i < 12; ++i) {
    const uint32_t packed = i < 8 ? a[i / 2] : b[(i - 8) / 2];
    const uint16_t bits = static_cast<uint16_t>(i % 2 ? packed >> 16 : packed);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    if (kBfloat) {
      memcpy(&mine[i], &wide, sizeof wide);
    } else {
      mine[i] = half_bits_to_float(bits);
    }
  }
  const auto* all = machine.exchange(line, mine, sizeof mine);
  const int lane = machine.lane();
  for (int i = 0; i < 4; ++i) {
    // a: rows l / 4 (+ 8 in registers 1 and 3), k = 2 (l % 4) (+ 8 in registers 2 and 3); b: column l / 4, the same k.
    const int column = 2 * (lane % 4) + i % 2, lower = i / 2;
    double sum = first ? 0.0 : c[i];
    for (int k = 0; k < 16; ++k) {
      float x, y;
      memcpy(&x, all[lane / 4 * 4 + k % 8 / 2].bytes + 4 * (2 * (lower + 2 * (k / 8)) + k % 2), sizeof x);
      memcpy(&y, all[column * 4 + k % 8 / 2].bytes + 4 * (8 + 2 * (k / 8) + k % 2), sizeof y);
      sum += static_cast<double>(x) * static_cast<double>(y);
    }
    c[i] = cut_to_float(sum);
  }
}

template <class Params>
cudaError_t launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t,
                   const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  return emulator::machine().launch(name, grid, threads, shared_bytes, [&] { kernel(params); })
             ? cudaSuccess
             : cudaErrorLaunchFailure;
}

}  // namespace gradshield
