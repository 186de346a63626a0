// Runs the ghost dot product on the emulator and prints what it found, or "clean". A test compiles this with one line
// of the kernels changed.
#include <cstdio>
#include <string>
#include <vector>

#include "ghost_dot/ghost_dot.cuh"

int main() {
  constexpr int64_t kTokens = 70, kIn = 100, kOut = 72, kStride = 104;
  // small whole numbers: every sum is exact, so a result is right or wrong
  std::vector<uint16_t> a(kTokens * kStride), g(kTokens * kOut);
  std::vector<float> r(kOut * kStride), parts(2 * kTokens), u(kTokens), truth(kTokens);
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
  allow(parts.data(), 2, kTokens, kTokens, 4, true);
  allow(u.data(), 1, kTokens, kTokens, 4, true);
  gradshield::ghost_dot(
      {a.data(), g.data(), r.data(), parts.data(), u.data(), kTokens, kIn, kOut, 1, kStride, 1, kOut, 1, kOut * kStride,
       kStride, 1, gradshield::kBfloat16, gradshield::kBfloat16, gradshield::kFloat32},
      nullptr);
  std::string problem = machine.error();
  if (problem.empty()) machine.all_written(&problem);
  if (problem.empty() && u != truth) problem = "wrong result";
  std::puts(problem.empty() ? "clean" : problem.c_str());
}
