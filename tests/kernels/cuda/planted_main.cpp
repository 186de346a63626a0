// Runs the ghost dot product on the emulator and prints what it found, or "clean". A test compiles this with one line
// of the kernels changed.
#include <cstdio>
#include <string>
#include <vector>

#include "ghost_dot/ghost_dot.cuh"

int main() {
  constexpr int64_t kTokens = 70, kIn = 200, kOut = 72, kStride = 208;
  // small whole numbers: every sum is exact, so a result is right or wrong
  std::vector<uint16_t> a(kTokens * kStride), g(kTokens * kOut);
  std::vector<float> r(kOut * kStride), parts(4 * kTokens), u(kTokens), truth(kTokens);
  const auto bf16 = [](float x) { return static_cast<uint16_t>(gradshield::float_bits(x) >> 16); };
  const auto a_at = [](int64_t t, int64_t i) { return static_cast<float>((3 * t + i) % 5); };
  const auto g_at = [](int64_t t, int64_t o) { return static_cast<float>((t + 2 * o) % 3); };
  const auto r_at = [](int64_t o, int64_t i) { return static_cast<float>((5 * o + 3 * i) % 7); };
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t i = 0; i < kIn; ++i) a[t * kStride + i] = bf16(a_at(t, i));
    for (int64_t o = 0; o < kOut; ++o) g[t * kOut + o] = bf16(g_at(t, o));
    for (int64_t o = 0; o < kOut; ++o)
      for (int64_t i = 0; i < kIn; ++i) truth[t] += g_at(t, o) * (r[o * kStride + i] = r_at(o, i)) * a_at(t, i);
  }
  auto& machine = emulator::machine();
  const auto allow = [&](const void* data, int64_t rows, int64_t columns, int64_t stride, int bytes, bool output) {
    const int64_t sizes[] = {rows, columns}, strides[] = {stride, 1};
    machine.allow(data, sizes, strides, 2, bytes, output);
  };
  allow(a.data(), kTokens, kIn, kStride, 2, false);
  allow(g.data(), kTokens, kOut, kOut, 2, false);
  allow(r.data(), kOut, kIn, kStride, 4, false);
  allow(parts.data(), 4, kTokens, kTokens, 4, true);
  allow(u.data(), 1, kTokens, kTokens, 4, true);
  gradshield::GhostDotParams p{};
  p.a = a.data();
  p.g = g.data();
  p.r = r.data();
  p.parts = parts.data();
  p.u = u.data();
  p.tokens = kTokens;
  p.d_in = kIn;
  p.d_out = kOut;
  p.directions = 1;
  p.slices = 2;
  p.stride_a_t = p.stride_r_o = kStride;
  p.stride_g_t = kOut;
  p.stride_a_i = p.stride_g_o = p.stride_r_i = 1;
  p.dtype_a = p.dtype_g = gradshield::kBfloat16;
  p.dtype_r = gradshield::kFloat32;
  gradshield::ghost_dot(p, nullptr);
  std::string problem = machine.error();
  if (problem.empty()) machine.all_written(&problem);
  if (problem.empty() && u != truth) problem = "wrong result";
  std::puts(problem.empty() ? "clean" : problem.c_str());
}
